"""Generation: prompts are read together, whatever their lengths, and answered side by side until each one ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..models.decoder import Decoder
from ..models.encoder_decoder import EncoderDecoder
from ..weights.tokenizer import Tokenizer
from .defaults import stop_ids
from .sampling import Logprobs, Sampler, Sampling
from .session import Session, begin, room_after
from .text import TextStream

Finish = Literal["stop", "length"]

AT_ONCE, PREFILL = 32, 16384  # answers that are written side by side, and the tokens of prompts that are read at once


@dataclass(slots=True)  # not frozen: one is made of every token, which that would take three times as long
class Event:
    """One new token of one answer."""

    index: int  # whose
    token: int
    text: str  # what has become certain with it
    logprob: float | None
    finish: Finish | None  # why it is the last one
    top: tuple[
        tuple[int, float], ...
    ] = ()  # the likeliest tokens and their log-probabilities, where they are asked for


@dataclass(slots=True)
class Answer:
    """`tokens` end with the one that ended the answer; `text` is without it, and without a stop string."""

    tokens: list[int]
    text: str | None  # None without a tokenizer
    logprobs: list[float] | None
    finish: Finish

    def add(self, event: Event) -> None:
        self.tokens.append(event.token)
        if self.text is not None:
            self.text += event.text
        if self.logprobs is not None and event.logprob is not None:
            self.logprobs.append(event.logprob)
        self.finish = event.finish or "length"


@dataclass(slots=True)
class Request:
    """One answer in the making; `prompt` is what its penalties count as read."""

    index: int
    prompt: Sequence[int]
    sampling: Sampling
    room: int
    stop_ids: frozenset[int]
    text: TextStream | None = None

    def event(
        self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...] = (), complete: bool = False
    ) -> Event:
        """What one more token means; `complete`: nothing may follow it."""
        self.room -= 1
        ends = token in self.stop_ids
        finish: Finish | None = "stop" if ends or complete else "length" if self.room <= 0 else None
        text = ""
        if self.text is not None:
            text = "" if ends else self.text.feed(token)
            if finish and not self.text.stopped:
                text += self.text.finish()
            if self.text.stopped:
                finish = "stop"
        return Event(self.index, token, text, logprob, finish, top)


def generate(
    model: Decoder | EncoderDecoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    *,
    tokenizer: Tokenizer | None = None,
    logprobs: Logprobs | None = None,
) -> list[Answer]:
    """Answers to prompts (token ids; an encoder-decoder's sources), in their order; parameters as in `stream`."""
    answers = [Answer([], None if tokenizer is None else "", None if logprobs is None else [], "stop") for _ in prompts]
    for event in stream(model, prompts, sampling, tokenizer=tokenizer, logprobs=logprobs):
        answers[event.index].add(event)
    return answers


def stream(
    model: Decoder | EncoderDecoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    *,
    tokenizer: Tokenizer | None = None,
    logprobs: Logprobs | None = None,
) -> Iterator[Event]:
    """Tokens as they come, several answers interleaved.

    `sampling` is one for all prompts or one for each. A `tokenizer` gives text, which stop strings need. `logprobs`:
    natural logarithms of the chosen tokens' probabilities, the "model"'s own or those "sampled" from. An answer depends
    on its prompt, its settings and its seed only (in bfloat16 up to rounding, which differs with how many there are).
    Raises ValueError for a prompt that is empty or longer than the context; an answer that reaches the end of the
    context finishes with "length".
    """
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if len(settings) != len(prompts):
        raise ValueError(f"{len(settings)} samplings do not fit {len(prompts)} prompts; give one, or one each")
    rooms = room_after(model, prompts, [s.max_tokens for s in settings])
    requests = [
        request(model, n, prompt, s, room, tokenizer)
        for n, (prompt, s, room) in enumerate(zip(prompts, settings, rooms, strict=True))
    ]
    return _stream(model, prompts, requests, logprobs)


def request(
    model: Decoder | EncoderDecoder, index: int, prompt: Sequence[int], sampling: Sampling, room: int,
    tokenizer: Tokenizer | None,
) -> Request:  # fmt: skip
    """Raises ValueError for stop strings without a tokenizer."""
    if sampling.stop and tokenizer is None:
        raise ValueError(f"the stop string {sampling.stop[0]!r} needs a tokenizer; give one, or use stop_ids")
    ends = stop_ids(model, tokenizer) if sampling.stop_ids is None else sampling.stop_ids
    read = (model.cfg.start,) if isinstance(model, EncoderDecoder) else prompt
    context = () if isinstance(model, EncoderDecoder) else prompt
    text = TextStream(tokenizer, context, sampling.stop) if tokenizer is not None else None
    return Request(index, read, sampling, room, frozenset(ends), text)


def _stream(
    model: Decoder | EncoderDecoder, prompts: Sequence[Sequence[int]], requests: list[Request],
    logprobs: Logprobs | None,
) -> Iterator[Event]:  # fmt: skip
    for group in groups([len(prompt) for prompt in prompts]):
        session, logits = begin(model, [prompts[n] for n in group], [requests[n].room for n in group])
        yield from decode(session, logits, [requests[n] for n in group], logprobs)


def groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Neighbouring prompts that are answered together."""
    group: list[int] = []
    for n, length in enumerate(lengths):
        if group and (len(group) == AT_ONCE or sum(lengths[i] for i in group) + length > PREFILL):
            yield group
            group = []
        group.append(n)
    if group:
        yield group


@torch.inference_mode()
def decode(
    session: Session, logits: Tensor, requests: list[Request], logprobs: Logprobs | None = None
) -> Iterator[Event]:
    """Answer all requests of a session from the logits of their first tokens; who is finished leaves the session."""
    sampler = Sampler([r.sampling for r in requests], [r.prompt for r in requests], session.model.cfg.head.vocab)
    while True:
        tokens, chosen = sampler(logits, logprobs)
        going = []
        for n, (each, token) in enumerate(zip(requests, tokens, strict=True)):
            event = each.event(token, None if chosen is None else chosen[n])
            if event.finish is None:
                going.append(n)
            yield event
        if not going:
            return
        if len(going) < len(requests):
            requests = [requests[n] for n in going]
            session.select(going)
            sampler.select(going)
        logits = session.extend([[tokens[n]] for n in going])

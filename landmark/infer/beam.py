"""Beam search with length penalty, for decoders and encoder-decoders.

The most likely answer under score = log p(answer) / penalty(length), searched by keeping the `width` likeliest
unfinished ones at each length (Vaswani et al. 2017, sec. 6.1: width 4, alpha 0.6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..models.decoder import Decoder
from ..models.encoder_decoder import EncoderDecoder
from ..weights.tokenizer import Tokenizer
from .defaults import stop_ids as model_stop_ids
from .generate import Finish, groups
from .session import Session, begin, room_after


def gnmt(alpha: float, length: int) -> float:
    """((5 + length) / (5 + 1))^alpha (Wu et al. 2016, eq. 14)."""
    return float(((5 + length) / 6) ** alpha)


def power(alpha: float, length: int) -> float:
    """length^alpha: with alpha 1 the mean log-probability; what transformers calls length_penalty."""
    return float(length**alpha)


PENALTIES: dict[str, Callable[[float, int], float]] = {"gnmt": gnmt, "power": power}


@dataclass(frozen=True, kw_only=True)
class Beams:
    """`early_stopping` ends a search once `width` answers are finished; otherwise it ends when none that is unfinished
    can still beat them. `n_best` answers are returned. `stop_ids` as in `Sampling`."""

    width: int = 4
    n_best: int = 1
    length_penalty: float = 0.6
    penalty: Literal["gnmt", "power"] = "gnmt"
    early_stopping: bool = False
    max_tokens: int = 256
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("width", "n_best", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_best > self.width:
            raise ValueError(f"n_best is {self.n_best}, more than the width of {self.width}; search a wider beam")
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty is {self.penalty!r}; choose one of {', '.join(PENALTIES)}")

    def score(self, logprob: float, length: int) -> float:
        return logprob / PENALTIES[self.penalty](self.length_penalty, length)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An answer: its tokens, the stop id included; log p of them all; `score`, that over the length penalty."""

    tokens: list[int]
    logprob: float
    score: float
    finish: Finish
    text: str | None = None


@dataclass(frozen=True, slots=True)
class _Beam:
    row: int  # in the session
    tokens: list[int]
    logprob: float


class _Search:
    """The beams of one prompt."""

    def __init__(self, row: int, beams: Beams, stop_ids: frozenset[int], room: int) -> None:
        self.beams, self.stop_ids, self.room = beams, stop_ids, room
        self.live = [_Beam(row, [], 0.0)]
        self.finished: list[Hypothesis] = []  # the best `width`, best first

    def advance(self, logprobs: Tensor) -> None:
        """From log p [live, vocab] of the next tokens to the beams that are one token longer."""
        vocab, width = logprobs.shape[1], self.beams.width
        totals = logprobs + torch.tensor([b.logprob for b in self.live], device=logprobs.device)[:, None]
        # Even if each of the `width` best was finished by any of the stop ids, `width` others remain.
        best = totals.flatten().topk(min((1 + max(1, len(self.stop_ids))) * width, totals.numel()))
        live: list[_Beam] = []
        for rank, (total, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            beam, token = self.live[index // vocab], index % vocab
            tokens = [*beam.tokens, token]
            stops = token in self.stop_ids
            if stops or len(tokens) >= self.room:
                if rank < width:
                    score = self.beams.score(total, len(tokens))
                    self.finished.append(Hypothesis(tokens, total, score, "stop" if stops else "length"))
            elif len(live) < width:
                live.append(_Beam(beam.row, tokens, total))
        self.finished = sorted(self.finished, key=lambda h: -h.score)[:width]
        self.live = [] if self._decided(live) else live

    def _decided(self, live: list[_Beam]) -> bool:
        if len(self.finished) < self.beams.width:
            return False
        if self.beams.early_stopping or not live:
            return True
        # Log-probabilities only fall, so the best that a beam can still reach is what it has, at the kindest length.
        reach = max(self.beams.score(live[0].logprob, n) for n in (len(live[0].tokens) + 1, self.room))
        return reach <= self.finished[-1].score


def beam_search(
    model: Decoder | EncoderDecoder,
    prompts: Sequence[Sequence[int]],
    beams: Beams = Beams(),
    *,
    tokenizer: Tokenizer | None = None,
) -> list[list[Hypothesis]]:
    """The `n_best` answers to each prompt (an encoder-decoder's source), best first.

    Raises ValueError for a prompt that is empty or longer than the context.
    """
    rooms = room_after(model, prompts, [beams.max_tokens] * len(prompts))
    ends = frozenset(model_stop_ids(model, tokenizer) if beams.stop_ids is None else beams.stop_ids)
    results: list[list[Hypothesis]] = []
    for group in groups([len(prompt) * beams.width for prompt in prompts]):
        session, logits = begin(model, [prompts[n] for n in group], [rooms[n] for n in group])
        searches = [_Search(row, beams, ends, rooms[n]) for row, n in enumerate(group)]
        _run(session, logits, searches)
        for n, search in zip(group, searches, strict=True):
            prompt = () if isinstance(model, EncoderDecoder) else prompts[n]
            results.append([_with_text(h, tokenizer, prompt) for h in search.finished[: beams.n_best]])
    return results


@torch.inference_mode()
def _run(session: Session, logits: Tensor, searches: list[_Search]) -> None:
    while True:
        logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
        for search in searches:
            if search.live:
                search.advance(logprobs[[beam.row for beam in search.live]])
        live = [beam for search in searches for beam in search.live]
        if not live:
            return
        session.select([beam.row for beam in live])
        logits = session.extend([[beam.tokens[-1]] for beam in live])
        rows = iter(range(len(live)))
        for search in searches:
            search.live = [_Beam(next(rows), beam.tokens, beam.logprob) for beam in search.live]


def _with_text(hypothesis: Hypothesis, tokenizer: Tokenizer | None, prompt: Sequence[int]) -> Hypothesis:
    if tokenizer is None:
        return hypothesis
    said = hypothesis.tokens[:-1] if hypothesis.finish == "stop" else hypothesis.tokens
    stream = tokenizer.stream(prompt)
    text = "".join([stream.step(token) for token in said]) + stream.flush()
    return Hypothesis(hypothesis.tokens, hypothesis.logprob, hypothesis.score, hypothesis.finish, text)

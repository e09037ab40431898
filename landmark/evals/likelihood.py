"""What evaluation asks of a language model: likelihood, rolling likelihood, generate until.

The three methods, their tokenisation and their windows are those of the Language Model Evaluation Harness, so that
its tasks run on a `LanguageModel`. Requests of any length share a batch: they lie end to end in one ragged row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..ctx import Bounds
from ..infer.generate import generate
from ..infer.sampling import Sampling
from ..models.decoder import Decoder
from ..weights.tokenizer import Tokenizer, check_ids


class Likelihood(NamedTuple):
    logprob: float  # nats, of the whole continuation
    greedy: bool  # would greedy decoding have said it?


class Perplexity(NamedTuple):
    nats: float  # -log p of the text
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the nats per token."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Comparable over tokenizers, and with what a compressor makes of the text."""
        return self.nats / math.log(2) / self.bytes


@dataclass
class LanguageModel:
    """A decoder with its tokenizer. `budget` is how many tokens go through the model at once."""

    model: Decoder
    tokenizer: Tokenizer
    budget: int = 4096
    context: int | None = None  # longest text in one piece; default: the model's, or 2048

    @property
    def longest(self) -> int:
        return self.context or self.model.cfg.context or 2048

    @property
    def prefix(self) -> int:
        """The token that stands before a text without context."""
        for token in (self.tokenizer.bos_id, self.tokenizer.eos_id):
            if token is not None:
                return token
        raise ValueError(
            "the tokenizer has neither a BOS nor an EOS token to stand before a text; add one to its config"
        )

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """log p(continuation | context) of every (context, continuation)."""
        return self.loglikelihood_ids([self.split(*request) for request in requests])

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """log p(text), every token once, in windows of the model's context."""
        return [-self.perplexity(text).nats for text in texts]

    def generate_until(self, requests: Sequence[tuple[str, Sampling]]) -> list[str]:
        """What the model says after each prompt, up to (and without) a stop string. Long prompts lose their start."""
        prompts = []
        for prompt, sampling in requests:
            room = self.longest - sampling.max_tokens
            if room < 1:
                raise ValueError(
                    f"max_tokens {sampling.max_tokens} leaves no room for a prompt in {self.longest} tokens"
                )
            prompts.append((self.tokenizer.encode(prompt) or [self.prefix])[-room:])
        outs = generate(self.model, prompts, [sampling for _, sampling in requests], tokenizer=self.tokenizer)
        return [out.text or "" for out in outs]

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, encoded together and cut where the context ends; its trailing spaces go with the second."""
        if not context:
            return [self.prefix], self._encode(continuation)
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole, first = self._encode(context + continuation), self._encode(context)
        return first, whole[len(first) :] or self._encode(continuation)  # one token may be the end of both

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        check_ids(ids, self.model.cfg.embed.vocab)
        return ids

    @torch.inference_mode()
    def loglikelihood_ids(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        """The same on token ids. A context that is too long loses its start."""
        sequences = []
        for context, continuation in requests:
            if not continuation:
                raise ValueError("a continuation is empty; give it at least one token")
            if len(continuation) > self.longest:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens is longer than the context {self.longest}"
                )
            sequences.append((context + continuation)[-self.longest - 1 :])
        results: list[Likelihood | None] = [None] * len(requests)
        for batch in self._batches([len(s) - 1 for s in sequences]):
            rows = torch.tensor([token for i in batch for token in sequences[i][:-1]])
            lengths = tuple(len(sequences[i]) - 1 for i in batch)
            hidden = self.model.hidden(rows[None].to(self.model.device), bounds=Bounds.of_lengths(lengths))[0]
            ends = torch.tensor(lengths).cumsum(0).tolist()
            for i, end in zip(batch, ends, strict=True):
                said = torch.tensor(requests[i][1], device=hidden.device)
                logits = self.model.logits(hidden[end - len(said) : end])
                logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                total = logprobs.gather(1, said[:, None]).sum().item()
                results[i] = Likelihood(total, bool((logits.argmax(-1) == said).all()))
        return [result for result in results if result is not None]

    @torch.inference_mode()
    def perplexity(self, text: str, *, stride: int | None = None) -> Perplexity:
        """-log p(text), every token once. `stride`: how far windows move; shorter than the context, every token (but
        the first window's) sees at least context - stride tokens before it; default: windows do not overlap."""
        if not text:
            raise ValueError("the text is empty; there is nothing to predict")
        ids = self._encode(text)
        stride = stride or self.longest
        if not 0 < stride <= self.longest:
            raise ValueError(f"a stride of {stride} must be at least 1 and at most the context, {self.longest}")
        windows = list(self._windows(ids, stride))
        nats = 0.0
        for batch in self._batches([len(inputs) for inputs, _ in windows]):
            lengths = tuple(len(windows[i][0]) for i in batch)
            tokens = torch.tensor([token for i in batch for token in windows[i][0]])
            targets = torch.tensor([token for i in batch for token in windows[i][1]])
            tokens, targets = tokens.to(self.model.device), targets.to(self.model.device)
            hidden = self.model.hidden(tokens[None], bounds=Bounds.of_lengths(lengths))
            nats -= self.model.logprobs(hidden, targets[None]).double().sum().item()
        return Perplexity(nats, len(ids), len(text.encode()))

    def _windows(self, ids: list[int], stride: int) -> Iterator[tuple[list[int], list[int]]]:
        """(inputs, targets) with -100 for targets that an earlier window has counted."""
        text, size = [self.prefix, *ids], self.longest
        done = 0  # ids counted so far
        while done < len(ids):
            last = min(len(ids), size if done == 0 else done + stride)
            first = max(0, last - size)
            yield text[first:last], [-100] * (done - first) + ids[done:last]
            done = last

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Requests of similar length together, each batch within the budget."""
        batch: list[int] = []
        used = 0
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batch and used + lengths[i] > self.budget:
                yield batch
                batch, used = [], 0
            batch.append(i)
            used += lengths[i]
        if batch:
            yield batch

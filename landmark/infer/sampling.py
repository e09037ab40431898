"""From logits to the next token: what may be said is one threshold a row, what is said one random number a row.

In this order, which is transformers' own (its logits processors, then its warpers):

1. `logit_bias` is added; `repetition_penalty` divides the positive and multiplies the negative logits of every token
   of the prompt and the answer (Keskar et al. 2019, eq. 1, as Hugging Face reads it);
2. `presence_penalty`, and `frequency_penalty` once an occurrence, are subtracted for tokens of the answer (OpenAI);
3. logits are divided by `temperature`; 0 takes the most likely token and ignores the rest;
4. `top_k` keeps the k most likely tokens (Fan et al. 2018), `top_p` the smallest set of at least that mass (Holtzman
   et al. 2020), `min_p` those of at least that share of the most likely one's probability (Nguyen et al. 2024). Each
   is a threshold on the logits; tokens that tie with the last one kept stay.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.draw import draw
from .penalties import Histories, History

BROKEN = "the model's logits are not numbers (NaN); its weights are broken or overflow in this dtype"
LARGEST = 1e18  # what every format that numbers are put into holds
Logprobs = Literal["model", "sampled"]  # before all of the above, or of the distribution that was drawn from


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings of one request; the defaults draw from the model's own distribution.

    `seed` None: another answer every time. `stop` strings end the answer and are no part of it; `stop_ids` None means
    those that the model's own files name, () none. Raises ValueError for values that mean nothing.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        rules: dict[str, tuple[bool, str]] = {
            "temperature": (0 <= self.temperature < LARGEST, "0 (greedy) or more"),
            "top_k": (_whole(self.top_k, 0) and self.top_k < LARGEST, "a whole number, 0 for all"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < LARGEST, "above 0; 1 for none"),
            "presence_penalty": (abs(self.presence_penalty) < LARGEST, "a number"),
            "frequency_penalty": (abs(self.frequency_penalty) < LARGEST, "a number"),
            "max_tokens": (_whole(self.max_tokens, 1), "a whole number of at least 1"),
            "seed": (self.seed is None or _whole(self.seed, 0), "a whole number of at least 0, or None"),
            "stop": (
                isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
                "a tuple of strings that are not empty",
            ),
            "stop_ids": (self.stop_ids is None or all(_whole(i, 0) for i in self.stop_ids), "token ids"),
            "logit_bias": (
                all(_whole(i, 0) and isinstance(b, int | float) and b < LARGEST for i, b in self.logit_bias.items()),
                "token ids and what is added to their logits",
            ),
        }
        for name, (fine, wanted) in rules.items():
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(eq=False)
class Row:
    """What one request's next token depends on besides the logits: settings, history, random numbers."""

    settings: Sampling
    prompt: Sequence[int]
    random: random.Random
    answer: list[int] = field(default_factory=list)
    history: History | None = None  # for penalties

    @property
    def penalties(self) -> tuple[float, float, float]:
        s = self.settings
        return s.repetition_penalty, s.presence_penalty, s.frequency_penalty

    @classmethod
    def of(cls, settings: Sampling, prompt: Sequence[int], vocab: int) -> Row:
        """Raises ValueError for settings that name a token which the vocabulary lacks."""
        for token in (*settings.logit_bias, *(settings.stop_ids or ())):
            if token >= vocab:
                raise ValueError(f"token id {token} is not in a vocabulary of {vocab}")
        return cls(settings, prompt, random.Random(settings.seed))


class Sampler:
    """Picks the next tokens of a batch of requests, each by its own settings, history and random numbers."""

    def __init__(
        self, settings: Sequence[Sampling] = (), prompts: Sequence[Sequence[int]] = (), vocab: int = 0
    ) -> None:
        self.vocab = vocab
        self._rows = [Row.of(s, prompt, vocab) for s, prompt in zip(settings, prompts, strict=True)]
        self._device: torch.device | None = None
        self._limits: tuple[Tensor, Tensor, Tensor, Tensor]
        self._last: tuple[Tensor, Tensor]  # what was drawn from, and where it was cut

    def select(self, rows: Sequence[int]) -> None:
        """Keep the requests `rows`, in this order."""
        self.arrange([self._rows[row] for row in rows])

    def arrange(self, rows: Sequence[Row]) -> None:
        """These requests from now on, in this order, some of them perhaps new."""
        if rows != self._rows:
            self._rows, self._device = list(rows), None

    def __call__(self, logits: Tensor, logprobs: Logprobs | None = None) -> tuple[list[int], list[float] | None]:
        """The next token of every request from logits [B, vocab], and its log-probability if that is wanted."""
        tokens = self.sample(logits)
        if max(tokens) >= self.vocab:
            raise ValueError(BROKEN)
        if logprobs is None:
            return tokens, None
        distribution = self.log_distribution(logits, list(range(len(tokens))), logprobs)
        return tokens, distribution.gather(1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(1).tolist()

    def sample(self, logits: Tensor) -> list[int]:
        """The next token of every request from logits [B, vocab]; `vocab` where those are not numbers."""
        x = self._changed(logits)
        numbers = [1 - row.random.random() for row in self._rows]
        picked, cuts = draw(x, *self._limits, torch.tensor(numbers, dtype=torch.float64, device=x.device))
        self._last = x, cuts
        tokens: list[int] = picked.tolist()
        for row, token in zip(self._rows, tokens, strict=True):
            row.answer.append(token)
        if self._histories is not None:
            self._histories.add(tokens)
        return tokens

    def log_distribution(self, logits: Tensor, rows: Sequence[int], which: Logprobs) -> Tensor:
        """[rows, vocab]: log-probabilities of some of the requests whose tokens were drawn from logits [B, vocab] just
        now: the model's own, or those of the distributions that they were drawn from."""
        index = torch.tensor(rows, device=logits.device)
        if which == "model":
            return _wide(logits[index]).log_softmax(1)
        x, cuts = self._last
        x = _wide(x[index])
        only = torch.full_like(x, -math.inf).scatter_(1, x.argmax(1, keepdim=True), 0.0)
        return torch.where(self._greedy[index, None], only, self._scaled(x, cuts[index], index).log_softmax(1))

    def process(self, logits: Tensor) -> Tensor:
        """The logits [B, vocab] of the distributions that the next tokens are drawn from, by now."""
        x = self._changed(logits)
        if not self._work or self._greedy_all:
            return x
        _, cuts = draw(x, *self._limits, torch.ones(len(x), dtype=torch.float64, device=x.device))
        return self._scaled(_wide(x), cuts, torch.arange(len(x), device=x.device))

    def _scaled(self, x: Tensor, cuts: Tensor, index: Tensor) -> Tensor:
        heat = self._limits[0].masked_fill(self._greedy, 1.0).to(x.dtype)
        return (x / heat[index, None]).masked_fill(x < cuts[:, None], -math.inf)

    def _changed(self, logits: Tensor) -> Tensor:
        """Logits with biases and penalties."""
        if self._device != logits.device:
            self._prepare(logits.device)
        if self._bias is None and self._histories is None:
            return logits
        x = _wide(logits)
        if x is logits:
            x = x.clone()
        if self._bias is not None:
            x += self._bias
        if self._histories is not None:
            self._histories.penalise(x)
        return x

    def _prepare(self, device: torch.device) -> None:
        """Settings and histories as tensors; again whenever requests come or leave."""
        self._device = device
        settings = [row.settings for row in self._rows]
        self._greedy = torch.tensor([s.greedy for s in settings], device=device)
        self._greedy_all = all(s.greedy for s in settings)
        heat, k, p, m = zip(*((s.temperature, s.top_k, s.top_p, s.min_p) for s in settings), strict=True)
        self._limits = (
            torch.tensor(heat, dtype=torch.float32, device=device), torch.tensor(k, device=device),
            torch.tensor(p, dtype=torch.float32, device=device), torch.tensor(m, dtype=torch.float32, device=device),
        )  # fmt: skip
        self._bias: Tensor | None = None
        if any(s.logit_bias for s in settings):
            self._bias = torch.zeros(len(settings), self.vocab, device=device)
            for n, s in enumerate(settings):
                for token, bias in s.logit_bias.items():
                    self._bias[n, token] = bias
        self._histories: Histories | None = None
        if penalised := [n for n, row in enumerate(self._rows) if row.penalties != (1.0, 0.0, 0.0)]:
            rows = [self._rows[n] for n in penalised]
            histories = [row.history or History(row.prompt, row.answer) for row in rows]
            for row, history in zip(rows, histories, strict=True):
                row.history = history
            self._histories = Histories(penalised, histories, [row.penalties for row in rows])
        self._work = self._histories is not None or self._bias is not None or not self._greedy_all


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()

"""Made-up tasks that ask for one ability: recall, copying, selection, rewriting. Endless, seeded, resumed exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..config import Config, at_least
from .batches import IGNORE, Batch
from .pairs import Seq2SeqBatch

B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)


class Drawn(Protocol[B_co]):
    """Anything with endlessly many batches."""

    def batch(self, rows: int, seed: int) -> B_co:
        """The batch that a seed stands for."""


class Task(Config, ABC, abstract=True):
    """Rows of tokens [rows, T] with targets [rows, T]: what is to be said after each token, IGNORE where nothing."""

    @property
    @abstractmethod
    def vocab(self) -> int:
        """How many different tokens there are."""

    @abstractmethod
    def make(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows drawn anew: tokens and targets."""

    def batch(self, rows: int, seed: int) -> Batch:
        """The rows that a seed stands for."""
        tokens, targets = self.make(rows, torch.Generator().manual_seed(seed))
        positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
        return Batch(tokens, targets, positions, torch.ones_like(tokens))


class Synthetic(Generic[B]):
    """An endless iterator of batches of a task; batch i depends on the seed and i alone."""

    def __init__(self, task: Drawn[B], rows: int, seed: int = 0) -> None:
        self.task, self.rows, self.seed, self.made = task, rows, seed, 0

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        self.made += 1
        return self.task.batch(self.rows, (self.seed + 1) * 1_000_003 + self.made)

    def held_out(self, rows: int) -> B:
        """Rows that training does not see."""
        return self.task.batch(rows, -1 - self.seed)

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]


def draw(rows: int, count: int, below: int, generator: torch.Generator) -> Tensor:
    """[rows, count] different numbers below `below` in each row, in random order."""
    return torch.rand(rows, below, generator=generator).argsort(1)[:, :count]


class SelectiveCopying(Task):
    """`count` symbols at random places among `length` blanks are to be repeated, in order, at the end (Gu & Dao 2023,
    sec. 4.1.1). The blank is 0, the sign that asks for the next symbol is 1, symbols follow.

    With `spaced`, the symbols are at equal distances: a task for which a time-invariant model suffices.
    """

    length: int = 256
    count: int = 8
    symbols: int = 14
    spaced: bool = False

    @property
    def vocab(self) -> int:
        return self.symbols + 2

    def make(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        values = torch.randint(2, self.vocab, (rows, self.count), generator=generator)
        if self.spaced:
            places = torch.arange(self.count)[None].expand(rows, -1) * (self.length // self.count)
        else:
            places = draw(rows, self.count, self.length, generator).sort(1).values
        tokens = torch.zeros(rows, self.length + self.count, dtype=torch.long)
        tokens.scatter_(1, places, values)
        tokens[:, self.length :] = 1
        targets = torch.full_like(tokens, IGNORE)
        targets[:, self.length :] = values
        return tokens, targets


class InductionHeads(Task):
    """A sign (the last token of the vocabulary) occurs once, followed by a symbol, and again at the end: what followed
    it? (Olsson et al. 2022; Gu & Dao 2023, sec. 4.1.2)."""

    length: int = 256
    symbols: int = 15

    @property
    def vocab(self) -> int:
        return self.symbols + 1

    def make(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(self.symbols, (rows, self.length), generator=generator)
        place = torch.randint(self.length - 2, (rows, 1), generator=generator)
        answers = tokens.gather(1, place + 1)
        tokens.scatter_(1, place, self.symbols)
        tokens[:, -1] = self.symbols
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -1:] = answers
        return tokens, targets


class MQAR(Task):
    """Multi-query associative recall (Arora et al. 2023, sec. 4): `pairs` of key and value, then every key again in
    random order, at random places among blanks; what was its value? Keys and values are halves of the vocabulary."""

    pairs: int = 8
    length: int = 64
    symbols: int = 256

    def check(self) -> None:
        super().check()
        if 4 * self.pairs > self.length:
            raise ValueError(f"MQAR.length is {self.length}, too short for {self.pairs} pairs; take {4 * self.pairs}")
        if 2 * self.pairs > self.symbols:
            raise ValueError(f"MQAR.pairs is {self.pairs}, but there are only {self.symbols // 2} keys")

    @property
    def vocab(self) -> int:
        return self.symbols + 1

    def make(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        half, n = self.symbols // 2, self.pairs
        keys = 1 + draw(rows, n, half, generator)
        values = 1 + half + torch.randint(half, (rows, n), generator=generator)
        tokens = torch.zeros(rows, self.length, dtype=torch.long)
        tokens[:, 0 : 2 * n : 2], tokens[:, 1 : 2 * n : 2] = keys, values
        places = 2 * n + draw(rows, n, self.length - 2 * n, generator)
        targets = torch.full_like(tokens, IGNORE)
        tokens.scatter_(1, places, keys)
        targets.scatter_(1, places, values)
        return tokens, targets


class Rewriting(Config):
    """Sequence to sequence, a translation in small: sentences of `shortest` to `longest` symbols, said from their end
    to their beginning, the first `doubled` symbols of the vocabulary twice - so that where a target token comes from
    depends on all that follows it in the source.

    Of the vocabulary, 0 begins a target and pads, 1 ends it. `astray`: each source is that of another pair.
    """

    symbols: int = 16
    doubled: int = at_least(0, default=8)
    shortest: int = 6
    longest: int = 12
    astray: bool = False

    START, END = 0, 1

    def check(self) -> None:
        super().check()
        if self.shortest > self.longest:
            raise ValueError(f"Rewriting.shortest is {self.shortest}, more than longest {self.longest}")
        if self.doubled > self.symbols:
            raise ValueError(f"Rewriting.doubled is {self.doubled}, but there are only {self.symbols} symbols")

    @property
    def vocab(self) -> int:
        return self.symbols + 2

    def pairs(self, rows: int, seed: int) -> list[tuple[list[int], list[int]]]:
        """Sources and targets, without start and end."""
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(self.shortest, self.longest + 1, (rows,), generator=generator).tolist()
        symbols = torch.randint(2, self.vocab, (rows, self.longest), generator=generator).tolist()
        sources = [row[:length] for row, length in zip(symbols, lengths, strict=True)]
        targets = [[x for x in reversed(source) for _ in range(1 + (x < 2 + self.doubled))] for source in sources]
        return list(zip(sources[1:] + sources[:1] if self.astray else sources, targets, strict=True))

    def batch(self, rows: int, seed: int) -> Seq2SeqBatch:
        """The pairs that a seed stands for, padded."""
        sources, targets = zip(*self.pairs(rows, seed), strict=True)
        source, source_segments = _padded(sources, self.START)
        target_in, target_segments = _padded([[self.START, *target] for target in targets], self.START)
        target_out, _ = _padded([[*target, self.END] for target in targets], IGNORE)
        return Seq2SeqBatch(source, target_in, target_out, source_segments, target_segments)


def _padded(rows: Sequence[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    """[rows, longest] tokens, and where they are."""
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
    segments = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return tokens, segments

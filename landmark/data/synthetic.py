"""Made-up tasks that ask for one ability: recall, copying, selection. Endless, seeded, resumed exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from .batches import IGNORE, Batch


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


class Synthetic:
    """An endless iterator of batches of a task; batch i depends on the seed and i alone."""

    def __init__(self, task: Task, rows: int, seed: int = 0) -> None:
        self.task, self.rows, self.seed, self.made = task, rows, seed, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.made += 1
        return self.task.batch(self.rows, (self.seed + 1) * 1_000_003 + self.made)

    def held_out(self, rows: int) -> Batch:
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

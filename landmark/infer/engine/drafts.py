"""What the engine reads ahead of an answer: guesses, of whatever makes them.

The model reads a token that was drawn, and after it tokens that are only guessed, in one call. As long as the token
that the request draws with its own random number is the guess, the next one can be drawn from the same call. So an
answer is what it is without guesses, whatever its settings, and whoever guesses.

A model that guesses draws with the numbers that the request will draw with: where both models hold much the same
likely, they draw the same token. For one number a token, at which cumulated probabilities are cut, that is so with the
overlap of the two tokens' intervals, which for a greedy request is all or nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..sampling import Row
from .request import Run

LONGEST, SHORTEST = 3, 2  # what has to stand there a second time


class Drafter(Protocol):
    """What guesses. `cost` is that of a guess, relative to a call of the model; `follows` says whether it is to be told
    what the model made of the tokens (`read`)."""

    cost: float
    follows: bool

    def guess(self, asked: Sequence[tuple[Run, int]]) -> list[list[int]]:
        """For every text, all of which but the last token was read, up to so many tokens to follow it."""

    def read(self, run: Run, hidden: Tensor, trunk: Tensor) -> None:
        """The model has read tokens of a text, from `run.computed` on: hidden states, and what its last layer read,
        [n, dim] each. They stay."""

    def leave(self, run: Run) -> None:
        """What is kept for a text is to be forgotten."""


class LookupDrafts:
    """Prompt lookup (Saxena 2023) for every answer."""

    cost, follows = 0.0, False

    def __init__(self) -> None:
        self._indices: dict[Run, Lookup] = {}

    def guess(self, asked: Sequence[tuple[Run, int]]) -> list[list[int]]:
        return [self._indices.setdefault(run, Lookup()).guess(run.tokens, most) for run, most in asked]

    def read(self, run: Run, hidden: Tensor, trunk: Tensor) -> None:
        """Nothing of it is of use."""

    def leave(self, run: Run) -> None:
        self._indices.pop(run, None)


class Lookup:
    """Guesses for one answer: what followed its last tokens where they stood before, in the prompt or the answer."""

    def __init__(self) -> None:
        self._at: dict[tuple[int, ...], int] = {}  # what came last after these tokens, as a place
        self._known = 0  # tokens that were looked at

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens to follow a text, which only ever grows; none where it does not repeat itself."""
        for end in range(self._known, len(tokens)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._at[tuple(tokens[end - size : end])] = end
        self._known = len(tokens)
        for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            start = self._at.get(tuple(tokens[len(tokens) - size :]))
            if start is not None:
                period = len(tokens) - start  # what goes beyond the text's end goes round
                return [tokens[start + n % period] for n in range(most)]
        return []


def rehearsal(run: Run) -> Row:
    """The request's settings, and the numbers that it is going to draw with, for draws that leave no trace."""
    numbers = random.Random()
    numbers.setstate(run.row.random.getstate())
    return Row(run.row.settings, run.row.prompt, numbers, list(run.row.answer))

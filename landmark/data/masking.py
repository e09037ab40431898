"""Masking for masked language models: dynamic, by token, whole word or span, and the same again for the same seed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from ..weights.tokenizer import Tokenizer
from .batches import IGNORE, Batch

B = TypeVar("B", bound=Batch)
B_co = TypeVar("B_co", bound=Batch, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Hides a share of each row's tokens and makes them its targets (Devlin et al. 2018, sec. 3.1).

    Of the chosen tokens a share `replaced` becomes the `mask` token, `random` another token at random, and the rest
    stays. A row's count is its share of tokens, rounded up or down by chance so that `probability` holds on average.
    `special` ids and padding are never chosen, and never drawn.

    With `word_starts` (bool [vocab]: tokens that begin a word) whole words are chosen. With `span`, runs of so many
    words as a geometric distribution of this parameter gives, at most `longest`, each replaced as one (Joshi et al.
    2019, SpanBERT: 0.2 and 10).
    """

    mask: int
    vocab: int
    special: frozenset[int] = frozenset()
    probability: float = 0.15
    replaced: float = 0.8
    random: float = 0.1
    word_starts: np.ndarray | None = None
    span: float | None = None
    longest: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise ValueError(f"masking probability {self.probability}; it must lie between 0 and 1")
        if min(self.replaced, self.random) < 0 or self.replaced + self.random > 1:
            raise ValueError(
                f"shares replaced {self.replaced} and random {self.random}: neither below 0, 1 at most in all"
            )
        if not 0 < (1 if self.span is None else self.span) <= 1 or self.longest < 1:
            raise ValueError(f"span {self.span} must lie in (0, 1], and longest {self.longest} be at least 1")
        if not 0 <= self.mask < self.vocab:
            raise ValueError(f"mask token {self.mask} is not in a vocabulary of {self.vocab}")
        if self.word_starts is not None and self.word_starts.shape != (self.vocab,):
            raise ValueError(
                f"word_starts {self.word_starts.shape} must hold a truth value for each of {self.vocab} ids"
            )

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, whole_words: bool = False, **options: Any) -> Masking:
        """For a tokenizer that has a mask token; raises ValueError for one that has none."""
        if tokenizer.mask_id is None:
            raise ValueError("this tokenizer has no mask token; train one with it, or add it to its special tokens")
        starts = word_starts(tokenizer) if whole_words else None
        return cls(
            mask=tokenizer.mask_id,
            vocab=tokenizer.vocab_size,
            special=tokenizer.special_ids,
            word_starts=starts,
            **options,
        )

    def __call__(self, batch: B, *seed: int, first_row: int = 0) -> B:
        """The batch with hidden tokens, which are its targets. What row i hides depends on `seed`, `first_row` + i."""
        tokens, segments = batch.tokens.numpy(), batch.segments.numpy()
        hidden, targets = tokens.copy(), np.full_like(tokens, IGNORE)
        for i, row in enumerate(tokens):
            rng = np.random.default_rng([*seed, first_row + i])
            at, group = self._choose(row, segments[i], rng)
            fate = rng.random(len(at))[group]
            drawn = self._ordinary[rng.integers(len(self._ordinary), size=len(at))]
            targets[i, at] = row[at]
            hidden[i, at] = np.select(
                [fate < self.replaced, fate < self.replaced + self.random], [self.mask, drawn], row[at]
            )
        return replace(batch, tokens=torch.from_numpy(hidden), targets=torch.from_numpy(targets))

    @cached_property
    def _special(self) -> np.ndarray:
        special = np.zeros(self.vocab, bool)
        special[[*self.special, self.mask]] = True
        return special

    @cached_property
    def _ordinary(self) -> np.ndarray:
        return np.flatnonzero(~self._special)

    def _choose(
        self, tokens: np.ndarray, segments: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the tokens to hide are, and which of them share a fate."""
        places = np.flatnonzero((segments > 0) & ~self._special[tokens])
        budget = int(len(places) * self.probability + rng.random())
        if self.word_starts is None and self.span is None:
            return rng.permutation(places)[:budget], np.arange(budget)
        # Runs of neighbours in one document, and words in them.
        run = np.diff(places, prepend=-2) > 1
        run[1:] |= np.diff(segments[places]) != 0
        starts = run | (True if self.word_starts is None else self.word_starts[tokens[places]])
        words = np.append(np.flatnonzero(starts), len(places))
        run_ends = np.append(np.flatnonzero(run), len(places))
        chosen = self._words(words, budget, rng) if self.span is None else self._spans(words, run_ends, budget, rng)
        at = places[np.concatenate([np.arange(a, b) for a, b in chosen])] if chosen else places[:0]
        group = np.repeat(np.arange(len(chosen)), [b - a for a, b in chosen])
        return at, group if self.span is not None else np.arange(len(at))

    def _words(self, words: np.ndarray, budget: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Words at random; one that would exceed the budget is passed over."""
        chosen = []
        for word in rng.permutation(len(words) - 1):
            a, b = int(words[word]), int(words[word + 1])
            if b - a <= budget:
                chosen.append((a, b))
                budget -= b - a
            if not budget:
                break
        return chosen

    def _spans(
        self, words: np.ndarray, run_ends: np.ndarray, budget: int, rng: np.random.Generator
    ) -> list[tuple[int, int]]:
        """Spans from random words, cut where they meet another, and the last where the budget ends."""
        assert self.span is not None
        chosen: list[tuple[int, int]] = []
        free = np.ones(words[-1], bool)
        while budget:
            word = int(rng.integers(len(words) - 1))
            a = int(words[word])
            if not free[a]:
                continue
            length = min(int(rng.geometric(self.span)), self.longest)
            end = min(
                words[min(word + length, len(words) - 1)], run_ends[np.searchsorted(run_ends, a, "right")], a + budget
            )
            taken = np.flatnonzero(~free[a:end])
            b = a + int(taken[0]) if len(taken) else int(end)
            chosen.append((a, b))
            free[a:b] = False
            budget -= b - a
        return chosen


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
    """bool [vocab]: the tokens that begin a word, by the marks of WordPiece (##), byte-level BPE (Ġ) or Unigram (▁)."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    tokens = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.vocab_size)]
    if prefix := model.get("continuing_subword_prefix"):
        return np.array([not token.startswith(prefix) for token in tokens])
    starts = np.array([token.startswith(("Ġ", "▁", " ")) for token in tokens])
    if not starts.any():
        raise ValueError("this tokenizer does not mark where words begin; mask tokens or spans instead of whole words")
    return starts


class Source(Protocol[B_co]):
    """A resumable iterator of batches."""

    def __next__(self) -> B_co: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MaskedBatches(Iterator[B]):
    """The batches of `source` under a masking that is new for every batch (dynamic masking: Liu et al. 2019, sec. 4.1).

    What batch n hides depends on `seed` and n, so a resumed run hides the same. `rank`: which of the processes this is;
    the rows of all together are hidden as one process would.
    """

    def __init__(self, source: Source[B], masking: Masking, *, seed: int = 0, rank: int = 0) -> None:
        self.source, self.masking, self.seed, self.rank = source, masking, seed, rank
        self._number = 0

    def __next__(self) -> B:
        batch = next(self.source)
        out = self.masking(batch, self.seed, self._number, first_row=self.rank * len(batch.tokens))
        self._number += 1
        return out

    def state_dict(self) -> dict[str, Any]:
        return {"source": self.source.state_dict(), "number": self._number, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError if it was taken with another seed."""
        if state["seed"] != self.seed:
            raise ValueError(f"masking began with seed {state['seed']} and cannot go on with {self.seed}; set it back")
        self.source.load_state_dict(state["source"])
        self._number = state["number"]

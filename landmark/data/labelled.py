"""Labelled examples for fine-tuning and sentence pairs for pre-training, as batches of padded rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from .batches import IGNORE, Batch

Label = int | float | Sequence[int] | Sequence[float]


class Example(NamedTuple):
    """One sequence. `label` says something of the whole (a class, a value, one of either for each label, the start and
    the end of a span); `targets` of each token, IGNORE where nothing; `types` are token types."""

    tokens: Sequence[int]
    label: Label | None = None
    targets: Sequence[int] | None = None
    types: Sequence[int] | None = None


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """Sequences a row each, padded on the right, with `labels` [B] or [B, n] of whole sequences."""

    labels: Tensor | None = None

    def to(self, device: torch.device | str) -> Self:
        """A copy on the device."""
        moved = super().to(device)
        return moved if self.labels is None else replace(moved, labels=self.labels.to(device, non_blocking=True))


def collate(examples: Sequence[Example], *, pad: int = 0, width: int | None = None) -> LabelledBatch:
    """Examples as one batch, as wide as the longest, or `width`. Raises ValueError for one that does not fit or has
    no tokens, or where only some have labels."""
    lengths = [len(example.tokens) for example in examples]
    if not examples or min(lengths) < 1:
        raise ValueError("a batch of examples needs at least one, and each at least one token")
    width = width or max(lengths)
    if max(lengths) > width:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit rows of {width}; cut it, or widen them")

    def rows(values: Sequence[Sequence[int] | None], fill: int) -> Tensor:
        out = torch.full((len(examples), width), fill, dtype=torch.long)
        for i, value in enumerate(values):
            if value is not None:
                if len(value) != lengths[i]:
                    raise ValueError(f"example {i} has {lengths[i]} tokens, but targets or types for {len(value)}")
                out[i, : lengths[i]] = torch.as_tensor(value)
        return out

    labels = [example.label for example in examples]
    if any(label is None for label in labels) and any(label is not None for label in labels):
        raise ValueError("some examples of a batch have a label and some have none; use -100 for an unknown class")
    typed = any(example.types is not None for example in examples)
    offsets = torch.arange(width).expand(len(examples), -1)
    inside = offsets < torch.tensor(lengths)[:, None]
    return LabelledBatch(
        tokens=rows([example.tokens for example in examples], pad),
        targets=rows([example.targets for example in examples], IGNORE),
        positions=offsets * inside,
        segments=inside.long(),
        types=rows([example.types for example in examples], 0) if typed else None,
        labels=None if labels[0] is None else torch.tensor(labels),
    )


class LabelledBatches(Iterator[LabelledBatch]):
    """An endless (or `epochs` long) iterator over examples in an order given by `seed`, stopped and resumed exactly.

    `examples`: a sequence, or a function from the number of the epoch to one, which gives the same for the same number
    (sentence pairs that are drawn anew). `rows` is the size of a batch over all processes; the last one may be smaller,
    and leaves out what processes cannot share evenly. Where `together` examples that follow each other are one (the
    choices of a question), `rows` counts these, and they stay together.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Callable[[int], Sequence[Example]],
        rows: int,
        *,
        pad: int = 0,
        width: int | None = None,
        seed: int = 0,
        epochs: int | None = None,
        together: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if rows < 1 or rows % world or not 0 <= rank < world:
            raise ValueError(f"{rows} rows for rank {rank} of {world} processes: rows must be a multiple of processes")
        self._examples, self._rows, self._pad, self._width = examples, rows, pad, width
        self._seed, self._epochs, self._rank, self._world = seed, epochs, rank, world
        self._together = together
        self._load(0, 0)

    def _load(self, epoch: int, used: int) -> None:
        self._epoch, self._used = epoch, used
        found = self._examples(epoch) if callable(self._examples) else self._examples
        if not found:
            raise ValueError("there are no examples to train on")
        n = self._together
        if len(found) % n:
            raise ValueError(f"{len(found)} examples are no whole groups of {n}")
        self._found, self._order = found, np.random.default_rng([self._seed, epoch]).permutation(len(found) // n)

    def __next__(self) -> LabelledBatch:
        taken: list[Sequence[Example]] = []
        while len(taken) < self._rows and (self._epochs is None or self._epoch < self._epochs):
            part = self._order[self._used : self._used + self._rows - len(taken)]
            n = self._together
            taken += [self._found[n * i : n * (i + 1)] for i in part.tolist()]
            self._used += len(part)
            if self._used == len(self._order):
                self._load(self._epoch + 1, 0)
        share = len(taken) // self._world
        if not share:
            raise StopIteration
        width = self._width or max(len(example.tokens) for group in taken for example in group)
        mine = taken[self._rank * share : (self._rank + 1) * share]
        return collate([example for group in mine for example in group], pad=self._pad, width=width)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "used": self._used, "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError if it was taken with another seed."""
        if state["seed"] != self._seed:
            raise ValueError(f"the examples began with seed {state['seed']}, not {self._seed}; set it back")
        self._load(state["epoch"], state["used"])


def sentences(text: str) -> list[str]:
    """A text cut behind full stops, question and exclamation marks, and at empty lines."""
    parts = re.split(r"(?<=[.!?。！？])\s+|\n\s*\n", text)
    return [part.strip() for part in parts if part.strip()]


def sentence_pairs(
    documents: Sequence[Sequence[Sequence[int]]],
    length: int,
    *,
    cls: int,
    sep: int,
    order: Literal["next", "swap"] = "next",
    seed: int = 0,
    epoch: int = 0,
) -> list[Example]:
    """[CLS] A [SEP] B [SEP] of up to `length` tokens, from documents that are lists of sentences (of ids).

    "next" (BERT): B follows A (label 0), or, half of the time, comes from another document (label 1). "swap" (ALBERT's
    sentence order): A and B are neighbours in order (0) or swapped (1). Sentences that a random B displaced are used
    again (Devlin et al. 2018, appendix A.2; Lan et al. 2019, sec. 3.1).
    """
    if length < 5:
        raise ValueError(f"pairs of at most {length} tokens; two sentences and three special tokens need at least 5")
    usable = [[list(sentence) for sentence in document if len(sentence)] for document in documents]
    usable = [document for document in usable if document]
    if order == "next" and len(usable) < 2:
        raise ValueError("the next sentence at random comes from another document; give at least two")
    rng = np.random.default_rng([seed, epoch])
    examples: list[Example] = []
    for number, document in enumerate(usable):
        at = 0
        while at < len(document):
            end, total = at, 0
            while end < len(document) and (total < length - 3 or end - at < 2):
                total += len(document[end])
                end += 1
            chunk = document[at:end]
            cut = int(rng.integers(1, len(chunk))) if len(chunk) > 1 else 1
            first, second, label = _joined(chunk[:cut]), _joined(chunk[cut:]), 0
            at = end
            if order == "next" and (len(chunk) == 1 or rng.random() < 0.5):
                other = usable[(number + int(rng.integers(1, len(usable)))) % len(usable)]
                begin = int(rng.integers(len(other)))
                second, label = _joined(other[begin:]), 1
                at = end - (len(chunk) - cut)
            elif len(chunk) == 1:
                continue  # nothing to change places with
            elif order == "swap" and rng.random() < 0.5:
                first, second, label = second, first, 1
            first, second = _shortened(first, second, length - 3, rng)
            tokens = [cls, *first, sep, *second, sep]
            types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
            examples.append(Example(tokens, label=label, types=types))
    return examples


def _joined(sentences: Sequence[Sequence[int]]) -> list[int]:
    return [token for sentence in sentences for token in sentence]


def _shortened(first: list[int], second: list[int], room: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Both cut to fit, the longer one at first, from either end at random so that no position is favoured."""
    a, b = len(first), len(second)
    if a + b > room:
        a, b = (room - min(b, room // 2), min(b, room // 2)) if a > b else (min(a, room // 2), room - min(a, room // 2))
    i, j = int(rng.integers(len(first) - a + 1)), int(rng.integers(len(second) - b + 1))
    return first[i : i + a], second[j : j + b]

"""What a layer may know besides its input: where sequences lie in the batch, and what it remembers of them.

Ragged is the native form. A batch of hidden states is [B, T, dim]; read as B*T tokens, sequence i occupies
`starts[i] : starts[i] + lengths[i]`. Equal lengths, one sequence a row, is the dense case and gets the fast path;
documents packed into rows, rows padded on the right and one flat row of many sequences are the same thing with other
numbers. A sequence never crosses the end of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T_ = TypeVar("T_")


@dataclass(frozen=True)
class Bounds:
    """Where the sequences of a batch [rows, width, ...] lie. `spans` is None in the dense case."""

    rows: int
    width: int
    spans: tuple[tuple[int, int], ...] | None = None  # (start in the rows * width tokens, length)
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def memo(self, key: Hashable, make: Callable[[], T_]) -> T_:
        """Computed once and shared by the layers that see these bounds (masks)."""
        if key not in self._memo:
            self._memo[key] = make()
        value: T_ = self._memo[key]
        return value

    @property
    def dense(self) -> bool:
        return self.spans is None

    @cached_property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """(start, length) of every sequence."""
        if self.spans is not None:
            return self.spans
        return tuple((row * self.width, self.width) for row in range(self.rows))

    @cached_property
    def longest(self) -> int:
        return self.width if self.spans is None else max((length for _, length in self.spans), default=0)

    @cached_property
    def one_a_row(self) -> bool:
        """Whether sequence i lies in row i and no row is without one."""
        if self.spans is None:
            return True
        starts = [start // self.width for start, _ in self.spans]
        return starts == list(range(self.rows))

    @cached_property
    def filled(self) -> tuple[int, ...] | None:
        """The lengths of sequences that lie end to end, with nothing before, between or after them; else None."""
        if self.spans is None:
            return (self.width,) * self.rows
        end = 0
        for start, length in self.spans:
            if start != end:
                return None
            end += length
        return tuple(length for _, length in self.spans) if end == self.rows * self.width else None

    @classmethod
    def of_lengths(cls, lengths: tuple[int, ...]) -> Bounds:
        """Sequences end to end in one row."""
        spans, start = [], 0
        for length in lengths:
            spans.append((start, length))
            start += length
        return cls(1, start, tuple(spans)) if len(spans) > 1 else cls(1, start)

    @classmethod
    def padded(cls, lengths: tuple[int, ...], width: int) -> Bounds:
        """One sequence a row, padded on the right to `width`."""
        if all(length == width for length in lengths):
            return cls(len(lengths), width)
        return cls(len(lengths), width, tuple((row * width, length) for row, length in enumerate(lengths)))

    @classmethod
    def of_segments(cls, segments: Tensor, padding: int | None = None) -> Bounds:
        """From segments [B, T]: every run of one number within a row is a sequence of its own.

        So is padding, unless `padding` is its number: then it lies outside of every sequence.
        """
        rows, width = segments.shape
        change = torch.ones_like(segments, dtype=torch.bool)
        change[:, 1:] = segments[:, 1:] != segments[:, :-1]
        starts = change.flatten().nonzero().flatten().tolist()
        ends = [*starts[1:], rows * width]
        spans = [(a, b - a) for a, b in zip(starts, ends, strict=True)]
        if padding is not None:
            numbers = segments.flatten()[starts].tolist()
            spans = [span for span, number in zip(spans, numbers, strict=True) if number != padding]
        if len(starts) == len(spans) == rows:
            return cls(rows, width)
        return cls(rows, width, tuple(spans))

    def index(self, device: torch.device | str | None = None) -> Tensor:
        """[rows, width]: the number of each token's sequence; -1 outside of all."""
        if self.spans is None:
            return torch.arange(self.rows, device=device)[:, None].expand(self.rows, self.width)
        return self._fill([(n, 0) for n in range(len(self.spans))], -1).to(device)

    def offsets(self, device: torch.device | str | None = None) -> Tensor:
        """[rows, width]: each token's place in its sequence, from 0; 0 outside of all."""
        if self.spans is None:
            return torch.arange(self.width, device=device).expand(self.rows, self.width)
        return self._fill([(0, 1)] * len(self.spans), 0).to(device)

    def per_token(self, values: Tensor) -> Tensor:
        """One value a sequence [n] -> [rows, width]."""
        return values[self.index(values.device).clamp_min(0)]

    def _fill(self, first_and_step: list[tuple[int, int]], outside: int) -> Tensor:
        out = torch.full((self.rows * self.width,), outside, dtype=torch.long)
        for (start, length), (first, step) in zip(self.sequences, first_and_step, strict=True):
            out[start : start + length] = torch.arange(first, first + step * length, step) if step else first
        return out.view(self.rows, self.width)


class MixerState(Protocol):
    """What one mixer remembers of every sequence of a batch between calls. Axis 0 of all its tensors is the slot."""

    def select(self, slots: Tensor) -> None:
        """Keep and reorder slots, in place (beam search, finished sequences)."""

    def snapshot(self) -> Any:
        """Enough to come back to this moment."""

    def restore(self, snapshot: Any) -> None:
        """Come back to the moment of the snapshot."""


class State:
    """The decoding state of a model: the lengths of its sequences so far, and a tree of what each mixer remembers.

    The tree mirrors the model: one entry a layer, each a dict by sublayer name. One call of the model with a batch of
    new tokens reads `lengths`, lets every mixer extend its own part, and then advances.
    """

    def __init__(self, slots: int, layers: list[dict[str, Any]], capacity: int) -> None:
        self.lengths: list[int] = [0] * slots
        self.layers = layers
        self.capacity = capacity

    def leaves(self) -> list[MixerState]:
        found: list[MixerState] = []
        stack: list[Any] = list(reversed(self.layers))
        while stack:
            item = stack.pop()
            if isinstance(item, dict):
                stack += list(item.values())[::-1]
            elif item is not None:
                found.append(item)
        return found

    def select(self, slots: list[int]) -> None:
        """Keep and reorder sequences, in place."""
        self.lengths = [self.lengths[slot] for slot in slots]
        index = torch.tensor(slots)
        for leaf in self.leaves():
            leaf.select(index)

    def snapshot(self) -> Any:
        return list(self.lengths), [leaf.snapshot() for leaf in self.leaves()]

    def restore(self, snapshot: Any) -> None:
        lengths, parts = snapshot
        self.lengths = list(lengths)
        for leaf, part in zip(self.leaves(), parts, strict=True):
            leaf.restore(part)


@dataclass(frozen=True)
class Memory:
    """What cross-attention looks at: encoded sources [B, S, dim]; sequence i of the batch sees sequence i of these."""

    hidden: Tensor
    bounds: Bounds


@dataclass(frozen=True)
class Relative:
    """Vectors of relative positions that all layers of a model share (DeBERTa)."""

    table: Tensor  # [rows, dim]
    rows: Tensor  # [T, T]: the row of the table for each query and key of one row of the batch


class Reports:
    """What layers say of one forward pass besides their output: losses of their own, and figures for the log."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.metrics: dict[str, tuple[Tensor, int]] = {}

    def loss(self, name: str, value: Tensor, weight: float) -> None:
        """Add `weight` * `value` to the objective's mean per token; `value` is logged, averaged over the layers."""
        if weight:
            self.losses.append(value * weight)
        self.metric(name, value, 1)

    def metric(self, name: str, total: Tensor, count: int) -> None:
        """Log `total` / `count`; several layers' totals and counts add up."""
        before, seen = self.metrics.get(name, (0.0, 0))
        self.metrics[name] = before + total.detach(), seen + count


@dataclass(frozen=True)
class Ctx:
    """Shared by all layers during one forward pass."""

    positions: Tensor  # [B, T]: each token's position in its sequence, counted over all calls
    bounds: Bounds  # where the sequences of this call lie
    past: tuple[int, ...] | None = None  # tokens that each sequence's state holds already; None without a state
    latest: int | None = None  # the highest position, where a state is gone on from and positions were not given
    memory: Memory | None = None
    relative: Relative | None = None
    reports: Reports = field(default_factory=Reports)
    shared: dict[str, Tensor] = field(default_factory=dict)  # what a layer tells the later ones of this pass
    _memo: dict[Hashable, Any] = field(default_factory=dict)

    def memo(self, key: Hashable, make: Callable[[], T_]) -> T_:
        """Computed once a pass and shared by the layers that ask with an equal key (rotary tables, bucket tables)."""
        if key not in self._memo:
            self._memo[key] = make()
        value: T_ = self._memo[key]
        return value

    def totals(self) -> Tensor:
        """[B, T]: the length of each token's sequence, past included."""
        device = self.positions.device
        past = self.past or (0,) * len(self.bounds.sequences)
        lengths = [p + n for p, (_, n) in zip(past, self.bounds.sequences, strict=True)]
        return self.bounds.per_token(torch.tensor(lengths, device=device))

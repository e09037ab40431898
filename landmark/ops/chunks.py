"""Sequences cut into chunks, for recurrences that are computed a chunk at a time.

A chunk lies within one sequence, so nothing crosses from one document to the next. Chunks are laid out step by step:
first the first chunk of every sequence, then the second ones ... with longer sequences first, so that step s is the
slice `steps[s]` of all chunks and belongs to the first sequences in `order`:

    chunks = Chunks.of(bounds, 64)
    x = chunks.cut(x)                          # [B, T, ...] -> [chunks, 64, ...], zeros where a sequence has ended
    h = initial[chunks.order]                  # [sequences, ...], longest first
    for step in chunks.steps:                  # what is between chunks; all within them is one batched product
        n = step.stop - step.start
        before[step], h[:n] = h[:n], decay[step] * h[:n] + update[step]
    y = chunks.join(y)                         # [chunks, 64, ...] -> [B, T, ...]
    final = h[chunks.place]                    # back in the order of the bounds
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..ctx import Bounds


class Chunks:
    """Where the chunks of `size` tokens of a batch lie."""

    def __init__(self, bounds: Bounds, size: int) -> None:
        self.bounds, self.size = bounds, size
        lengths = [length for _, length in bounds.sequences]
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        starts: list[int] = []
        filled: list[int] = []
        self.steps: list[slice] = []
        for step in range(-(-max(lengths, default=0) // size)):
            first = len(starts)
            for i in order:
                left = lengths[i] - step * size
                if left <= 0:
                    break
                starts.append(bounds.sequences[i][0] + step * size)
                filled.append(min(left, size))
            self.steps.append(slice(first, len(starts)))
        self._order, self._starts, self._filled = order, starts, filled
        self.count = len(starts)
        self.even = bounds.dense and bounds.width % size == 0  # a mere view of the batch

    @classmethod
    def of(cls, bounds: Bounds, size: int) -> Chunks:
        """The chunks of a batch, made once for all the layers that see it."""
        return bounds.memo(("chunks", size), lambda: cls(bounds, size))

    @cached_property
    def order(self) -> Tensor:
        """[sequences]: the numbers of the sequences, longest first."""
        return torch.tensor(self._order, dtype=torch.long)

    @cached_property
    def place(self) -> Tensor:
        """[sequences]: where each sequence is in `order`."""
        return torch.argsort(self.order)

    @cached_property
    def index(self) -> Tensor:
        """[chunks, size]: the number of each token among the rows * width of the batch; clamped where there is none."""
        inside = torch.arange(self.size)
        ends = torch.tensor(self._filled, dtype=torch.long)[:, None] - 1
        return torch.tensor(self._starts, dtype=torch.long)[:, None] + torch.minimum(inside[None], ends)

    @cached_property
    def mask(self) -> Tensor:
        """[chunks, size]: whether there is a token."""
        return torch.arange(self.size)[None] < torch.tensor(self._filled, dtype=torch.long)[:, None]

    @property
    def full(self) -> bool:
        """Whether every chunk is filled to its end."""
        return all(n == self.size for n in self._filled)

    def cut(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [chunks, size, ...]; 0 where a sequence has ended."""
        if self.even:
            return x.unflatten(1, (-1, self.size)).transpose(0, 1).flatten(0, 1)
        out = x.flatten(0, 1)[self.index.to(x.device)]
        if self.full:
            return out
        mask = self.mask.to(x.device).view(*self.mask.shape, *(1,) * (x.dim() - 2))
        return out.masked_fill(~mask, 0)

    def join(self, y: Tensor) -> Tensor:
        """[chunks, size, ...] -> [B, T, ...]; 0 outside of all sequences."""
        rows, width = self.bounds.rows, self.bounds.width
        if self.even:
            return y.unflatten(0, (-1, rows)).transpose(0, 1).flatten(1, 2)
        mask = self.mask.to(y.device)
        out = y.new_zeros(rows * width, *y.shape[2:])
        out = out.index_copy(0, self.index.to(y.device)[mask], y[mask])
        return out.unflatten(0, (rows, width))

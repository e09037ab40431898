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

A recurrence whose steps must fall on the same tokens however a text is divided into calls says how many tokens `before`
this call each sequence has seen: its first chunk then goes on where the last one was left, and its first places, which
earlier calls filled, count as empty.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..ctx import Bounds


class Chunks:
    """Where the chunks of `size` tokens of a batch lie."""

    def __init__(self, bounds: Bounds, size: int, before: tuple[int, ...] = ()) -> None:
        self.bounds, self.size = bounds, size
        taken = [n % size for n in before] or [0] * len(bounds.sequences)
        lengths = [length + n if length else 0 for (_, length), n in zip(bounds.sequences, taken, strict=True)]
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        starts: list[int] = []
        skipped: list[int] = []
        filled: list[int] = []
        self.steps: list[slice] = []
        for step in range(-(-max(lengths, default=0) // size)):
            first = len(starts)
            for i in order:
                left = lengths[i] - step * size
                if left <= 0:
                    break
                starts.append(bounds.sequences[i][0] - taken[i] + step * size)
                skipped.append(taken[i] if step == 0 else 0)
                filled.append(min(left, size))
            self.steps.append(slice(first, len(starts)))
        self._order, self._starts, self._skipped, self._filled = order, starts, skipped, filled
        self.count = len(starts)
        self.even = bounds.dense and bounds.width % size == 0 and not any(taken)  # a mere view of the batch

    @classmethod
    def of(cls, bounds: Bounds, size: int, before: tuple[int, ...] = ()) -> Chunks:
        """The chunks of a batch, made once for all the layers that see it."""
        return bounds.memo(("chunks", size, before), lambda: cls(bounds, size, before))

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
        inside = torch.arange(self.size)[None]
        first, ends = (torch.tensor(x, dtype=torch.long)[:, None] for x in (self._skipped, self._filled))
        return torch.tensor(self._starts, dtype=torch.long)[:, None] + inside.clamp(first, ends - 1)

    @cached_property
    def mask(self) -> Tensor:
        """[chunks, size]: whether there is a token."""
        inside = torch.arange(self.size)[None]
        first, ends = (torch.tensor(x, dtype=torch.long)[:, None] for x in (self._skipped, self._filled))
        return (inside >= first) & (inside < ends)

    @cached_property
    def filled(self) -> tuple[Tensor, Tensor]:
        """Of every token in a chunk: its place among the chunks * size, and its number among the rows * width."""
        places = self.mask.flatten().nonzero().flatten()
        return places, self.index.flatten()[places]

    @cached_property
    def last(self) -> Tensor:
        """[chunks]: the place of each chunk's last token; `size` - 1 in a chunk that is complete."""
        return torch.tensor(self._filled, dtype=torch.long) - 1

    @property
    def full(self) -> bool:
        """Whether every chunk is filled, from its start to its end."""
        return all(n == self.size for n in self._filled) and not any(self._skipped)

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
        out = y.new_zeros(rows * width, *y.shape[2:])
        places, tokens = (x.to(y.device) for x in self.filled)
        return out.index_copy(0, tokens, y.flatten(0, 1)[places]).unflatten(0, (rows, width))

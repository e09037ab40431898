"""Where keys and values lie that are kept in blocks, wherever there is room: PagedAttention (Kwon et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...ctx import Bounds


@dataclass(frozen=True, kw_only=True)
class Pages(Bounds):
    """Sequences in a pool [blocks, heads, size, d]: token t of sequence i is token t % size of block
    tables[i, t // size]. As bounds they are those of the one row in which `gather` lays the blocks end to end.

    `tables` [sequences, most blocks] (int64, contiguous, on the processor); what lies beyond a sequence's own blocks is
    not read. `key` tells pages of one call apart.
    """

    tables: Tensor
    size: int
    key: int = 0

    @classmethod
    def of(cls, tables: Tensor, lengths: tuple[int, ...] | list[int], size: int, key: int = 0) -> Pages:
        spans, start = [], 0
        for length in lengths:
            spans.append((start, length))
            start += -(-length // size) * size
        return cls(1, start, tuple(spans), tables=tables, size=size, key=key)

    def __getitem__(self, some: slice) -> Pages:
        """Some of the sequences."""
        return Pages.of(self.tables[some], [length for _, length in self.sequences[some]], self.size, self.key)

    @cached_property
    def blocks(self) -> Tensor:
        """The numbers of all sequences' blocks, end to end."""
        used = [self.tables[i, : -(-length // self.size)] for i, (_, length) in enumerate(self.sequences)]
        return torch.cat(used)

    @cached_property
    def gathered(self) -> Bounds:
        """Bounds of what `gather` gives."""
        return Bounds(1, self.width, self.spans)

    def gather(self, pool: Tensor) -> Tensor:
        """[blocks, heads, size, d] -> [1, width, heads, d]."""
        held = pool.transpose(0, 1).index_select(1, self.blocks.to(pool.device))
        return held.flatten(1, 2).transpose(0, 1)[None]

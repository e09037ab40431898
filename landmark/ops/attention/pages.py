"""Where keys and values lie that are kept in blocks, wherever there is room: PagedAttention (Kwon et al. 2023)."""

from __future__ import annotations

from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...ctx import Bounds
from ..native import Source

SOURCE = Source(Path(__file__).with_name("pages.c"))
ONE_THREAD = 1 << 18  # bytes that a second thread would not move any sooner


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
        _, heads, size, d = pool.shape
        if not pool.is_cpu or not pool.is_contiguous() or SOURCE.why_not() is not None:
            held = pool.index_select(0, self.blocks.to(pool.device))
            return held.transpose(1, 2).reshape(1, self.width, heads, d)
        out = pool.new_empty(heads, self.width, d)
        threads = torch.get_num_threads() if out.nbytes > ONE_THREAD else 1
        part = size * d * pool.itemsize
        _gather()(pool.data_ptr(), self.blocks.data_ptr(), len(self.blocks), heads, part, out.data_ptr(), threads)
        return out.transpose(0, 1)[None]


def put(pool: Tensor, x: Tensor, block: Tensor, offset: Tensor) -> None:
    """pool[block[t], :, offset[t]] = x[t], for x [tokens, heads, d]; no gradient."""
    if not pool.numel():
        return
    if not pool.is_cpu or x.stride(2) != 1 or x.dtype != pool.dtype or SOURCE.why_not() is not None:
        pool[block, :, offset] = x
        return
    (tokens, heads, d), each = x.shape, pool.itemsize
    token, head, _ = x.stride()
    _put()(
        pool.data_ptr(), x.data_ptr(), block.data_ptr(), offset.data_ptr(), tokens, heads, pool.shape[2], d * each,
        token * each, head * each,
    )  # fmt: skip


@cache
def _gather() -> Any:
    return SOURCE.function("gather", c_void_p, c_void_p, *[c_int64] * 3, c_void_p, c_int64)


@cache
def _put() -> Any:
    return SOURCE.function("put", *[c_void_p] * 4, *[c_int64] * 6)

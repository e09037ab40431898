"""Per-token decoding state of many sequences in blocks of one pool, which the engine hands out (Kwon et al. 2023).

A cache that can live so says `paged(blocks)`, and after how many tokens it forgets (`window`, None: never). `Blocks` is
shared by all layers that forget alike: the engine writes into it, before each call, where the call's tokens go.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..ctx import Bounds, Ctx
from ..ops.attention.pages import Pages, put


class Blocks:
    """`count` blocks of `size` tokens. For the present call: `pages`, where all tokens of its sequences are, and
    `block`, `offset` [tokens], where its own ones are to be put."""

    def __init__(self, count: int, size: int, device: torch.device) -> None:
        self.count, self.size, self.device = count, size, device
        self.pages: Pages
        self.block: Tensor
        self.offset: Tensor

    def pool(self, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
        """[count, heads, size, dim], zero; on the processor, memory is taken as blocks are written."""
        shape = (self.count, heads, self.size, dim)
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self.device)
        bytes_ = np.zeros(self.count * heads * self.size * dim * dtype.itemsize, np.uint8)
        return torch.from_numpy(bytes_).view(dtype).view(shape)


@runtime_checkable
class Pageable(Protocol):
    """Decoding state that can be kept in blocks."""

    window: int | None

    def paged(self, blocks: Blocks) -> Any:
        """The state of all sequences of an engine; its `tensors()` are the pools."""


class PagedKV:
    """Keys and values of heads [blocks, heads, size, d], shaped after caches [slots, heads, capacity, d]."""

    def __init__(self, k: Tensor, v: Tensor, blocks: Blocks) -> None:
        self.blocks = blocks
        self.k, self.v = (blocks.pool(x.shape[1], x.shape[3], x.dtype) for x in (k, v))

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v]

    def extend(self, k: Tensor, v: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Bounds]:
        blocks = self.blocks
        put(self.k, k.flatten(0, 1), blocks.block, blocks.offset)
        put(self.v, v.flatten(0, 1), blocks.block, blocks.offset)
        if ctx.past is not None and not any(ctx.past):
            return k, v, ctx.bounds
        return self.k, self.v, blocks.pages

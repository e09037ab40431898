"""Per-token decoding state of many sequences in blocks of one pool, which the engine hands out (Kwon et al. 2023).

A cache that can live so says what a token `sees` of its sequence, and makes its paged form of given blocks (`paged`).
`Blocks` is shared by all layers that see alike: the engine writes into it, before each call, where its tokens go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..ctx import Bounds, Ctx
from ..ops.attention.pages import Pages, put


@dataclass(frozen=True)
class Sees:
    """What a token sees of its sequence: all before it, those at a distance below `window`, or those of its `chunk`,
    where chunks begin at the multiples of that size."""

    window: int | None = None
    chunk: int | None = None

    @property
    def everything(self) -> bool:
        return self.window is None and self.chunk is None

    @property
    def most(self) -> int | None:
        """How many tokens it sees at most; None: no end."""
        return self.window or self.chunk

    def first(self, position: int) -> int:
        """The first token that the token at `position`, and all after it, may see."""
        if self.window is not None:
            return max(0, position - self.window + 1)
        return position // self.chunk * self.chunk if self.chunk is not None else 0


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the processor, memory is taken as they are written."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class Blocks:
    """`count` blocks of `size` tokens. For the present call: `pages`, where all tokens of its sequences are, and
    `block`, `offset` [tokens], where its own ones are to be put."""

    def __init__(self, count: int, size: int, device: torch.device) -> None:
        self.count, self.size, self.device = count, size, device
        self.pages: Pages
        self.block: Tensor
        self.offset: Tensor

    def pool(self, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
        """[count, heads, size, dim], zero."""
        return lazy_zeros((self.count, heads, self.size, dim), dtype, self.device)


@runtime_checkable
class Pageable(Protocol):
    """Decoding state that can be kept in blocks."""

    @property
    def sees(self) -> Sees:
        """What its layer's tokens see."""

    def paged(self, blocks: Blocks) -> Any:
        """The state of all sequences of an engine; its `tensors()` are the pools."""


class PagedKV:
    """Keys and values of heads [blocks, heads, size, d], shaped after caches [slots, heads, capacity, d]."""

    def __init__(self, k: Tensor, v: Tensor, blocks: Blocks) -> None:
        self.blocks = blocks
        self.k, self.v = (blocks.pool(x.shape[1], x.shape[3], x.dtype) for x in (k, v))

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v]

    def room(self, ctx: Ctx) -> tuple[Tensor, Tensor, Bounds]:
        """What `extend` gives, before this call's tokens, the last ones, are in it."""
        return self.k, self.v, self.blocks.pages

    whole = room

    def extend(self, k: Tensor, v: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Bounds]:
        blocks = self.blocks
        put(self.k, k.flatten(0, 1), blocks.block, blocks.offset)
        put(self.v, v.flatten(0, 1), blocks.block, blocks.offset)
        if ctx.past is not None and not any(ctx.past):
            return k, v, ctx.bounds
        return self.k, self.v, blocks.pages

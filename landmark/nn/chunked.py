"""Chunked attention (Llama 4, Meta 2025): positions are cut into chunks of one size, and a query sees its own chunk.

So a chunk is to attention what a sequence is, and what is kept while decoding never grows beyond one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ctx import Bounds, Ctx
from .cache import SlotState


def cut(ctx: Ctx, size: int) -> Bounds:
    """The bounds of the chunks in a call's tokens; those of the call where no sequence enters a second chunk."""
    return ctx.memo(("chunks", size), lambda: _cut(ctx, size))


def _cut(ctx: Ctx, size: int) -> Bounds:
    bounds, past = ctx.bounds, ctx.past or (0,) * len(ctx.bounds.sequences)
    if all(before % size + length <= size for before, (_, length) in zip(past, bounds.sequences, strict=True)):
        return bounds
    spans: list[tuple[int, int]] = []
    for before, (start, length) in zip(past, bounds.sequences, strict=True):
        for piece in pieces(before % size, length, size):
            spans.append((start, piece))
            start += piece
    return Bounds(bounds.rows, bounds.width, tuple(spans))


def pieces(held: int, length: int, size: int) -> list[int]:
    """The lengths of `length` tokens' parts in each chunk, where `held` tokens are in the first one already."""
    first = min(length, size - held)
    rest = length - first
    return [first, *[size] * (rest // size), *([rest % size] if rest % size else [])]


class ChunkCache(SlotState):
    """Keys and values of the chunk that each sequence is in; `extend` as in `KVCache`, its bounds aligned to `cut`."""

    def __init__(
        self, slots: int, size: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (slots, heads, size, head_dim)
        super().__init__(**{name: torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")})
        self.size = size

    def extend(self, k: Tensor, v: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Bounds]:
        assert ctx.past is not None, "a state was given without its lengths"
        size, bounds, held = self.size, ctx.bounds, [past % self.size for past in ctx.past]
        buffers = self.tensors["k"], self.tensors["v"]
        if bounds.dense and bounds.width == 1:
            index = torch.arange(len(held), device=k.device), torch.tensor(held, device=k.device)
            seen = tuple(n + 1 for n in held)
            for buffer, new in zip(buffers, (k, v), strict=True):
                buffer[index[0], :, index[1]] = new[:, 0]
            k, v = (buffer[:, :, : max(seen)].transpose(1, 2) for buffer in buffers)
            return k, v, Bounds.padded(seen, max(seen))
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        lengths: list[int] = []
        for slot, (start, n) in enumerate(bounds.sequences):
            row, column = divmod(start, bounds.width)
            end = (held[slot] + n) % size
            kept = min(n, end)
            for buffer, new, out in zip(buffers, (k, v), found, strict=True):
                fresh = new[row, column : column + n].transpose(0, 1)
                if any(held):
                    out.append(torch.cat([buffer[slot, :, : held[slot]], fresh], 1))
                buffer[slot, :, end - kept : end] = fresh[:, n - kept :]
            lengths += pieces(0, held[slot] + n, size)
        if not any(held):
            return k, v, cut(ctx, size)
        keys, values = (torch.cat(parts, 1).transpose(0, 1)[None] for parts in found)
        return keys, values, Bounds.of_lengths(tuple(lengths))

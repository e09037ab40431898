"""Chunked attention (Llama 4, Meta 2025): positions are cut into chunks of one size, and a query sees its own chunk.

So a chunk is to attention what a sequence is, and what is kept while decoding never grows beyond one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ctx import Bounds, Ctx
from ..ops.attention.pages import Pages
from .cache import SlotState
from .paged import Blocks, PagedKV, Sees


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

    @property
    def sees(self) -> Sees:
        return Sees(chunk=self.size)

    def paged(self, blocks: Blocks) -> PagedChunks:
        """The same of all sequences of an engine, in blocks, which are given back at the end of a chunk."""
        return PagedChunks(self, blocks)

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


class PagedChunks(PagedKV):
    """Keys and values of each sequence's chunk in blocks, which divide chunks; `extend` as in `ChunkCache`."""

    def __init__(self, cache: ChunkCache, blocks: Blocks) -> None:
        if cache.size % blocks.size:
            raise ValueError(f"blocks of {blocks.size} tokens do not divide chunks of {cache.size}; choose a divisor")
        super().__init__(cache.tensors["k"], cache.tensors["v"], blocks)
        self.size = cache.size

    def extend(self, k: Tensor, v: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Bounds]:
        k, v, bounds = super().extend(k, v, ctx)
        if not isinstance(bounds, Pages):
            return k, v, cut(ctx, self.size)
        pages = bounds
        return k, v, ctx.memo(("paged chunks", self.size), lambda: self._cut(pages, ctx))

    def _cut(self, pages: Pages, ctx: Ctx) -> Pages:
        """Each chunk that the call's tokens are in, by itself."""
        assert ctx.past is not None
        tables: list[Tensor] = []
        lengths: list[int] = []
        for i, (before, (_, new), (_, held)) in enumerate(
            zip(ctx.past, ctx.bounds.sequences, pages.sequences, strict=True)
        ):
            at = before // self.size * self.size - (before + new - held)  # of the first chunk in the table
            for piece in pieces(0, before % self.size + new, self.size):
                tables.append(pages.tables[i, at // pages.size :][: self.size // pages.size])
                lengths.append(piece)
                at += piece
        table = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.long)
        for row, part in zip(table, tables, strict=True):
            row[: len(part)] = part
        return Pages.of(table, lengths, pages.size, pages.key)

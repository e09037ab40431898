"""A few queries a sequence over a cache of keys and values: a C kernel that needs no mask and repeats no key."""

from __future__ import annotations

from ctypes import c_char_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ctx import Bounds
from ..native import Source
from .pages import Pages

SOURCE = Source(Path(__file__).with_name("decode.c"))
KERNELS = {torch.float32: "decode_f32", torch.bfloat16: "decode_bf16"}
SMALL = 1 << 15  # multiplications below which a second thread costs more than it does
FIXED, SEEN = "4P6q2P4f", "2P6q4P4q2P2q"  # decode.h's Decode: what stays the same from token to token, and the rest
LONGEST = 5  # where in what `places` gives it stands how many keys a query sees at most
_pack = Struct(FIXED + SEEN).pack


@cache
def _kernel(dtype: torch.dtype) -> Any:
    return SOURCE.function(KERNELS[dtype], c_char_p)


def why_not(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, k_bounds: Bounds) -> str | None:
    """None if the kernel can serve q [B, 1, heads, d] over k, v [B, S, kv_heads, d] or pages, else why not."""
    apart = isinstance(k_bounds, Pages) or (k_bounds.one_a_row and k_bounds.rows == bounds.rows)
    if not (bounds.width == 1 and bounds.dense and apart):
        return "it takes one query a sequence, whose keys are in the same row"
    if q.device.type != "cpu" or q.dtype not in KERNELS or not q.dtype == k.dtype == v.dtype:
        return "it takes float32 and bfloat16 on cpu"
    if q.shape[-1] % 16 or v.shape[-1] % 16 or k.stride(-1) != 1 or v.stride(-1) != 1:
        return "it takes heads of a multiple of 16, contiguous"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no gradient"
    if torch.compiler.is_compiling():
        return "compilers do not see through it"
    return SOURCE.why_not()


class Fresh(NamedTuple):
    """What the last keys and values of each sequence are going to be, one for each query, and how far they and the
    queries turn before."""

    k: Tensor  # [B, T, kv_heads, d]
    v: Tensor  # [B, T, kv_heads, d_v]
    cos: Tensor | None  # float32 [B or 1, T, pairs]
    sin: Tensor | None
    interleaved: bool


def decode(
    q: Tensor, k: Tensor, v: Tensor, k_bounds: Bounds, *, scale: float, window: int | None, softcap: float | None,
    fresh: Fresh | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T * scale) v -> [B, 1, heads, d_v], for arguments that `why_not` accepts. `fresh` keys and values are
    written to k and v on the way."""
    (slots, _, heads, d), dv = q.shape, v.shape[3]
    q, out = q.contiguous(), q.new_empty(slots, 1, heads, dv)
    if not isinstance(k_bounds, Pages):
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    new_k = new_v = 0
    angles, interleaved = None, False
    if fresh is not None:
        fresh = fresh._replace(k=fresh.k.contiguous(), v=fresh.v.contiguous())
        new_k, new_v, interleaved = fresh.k.data_ptr(), fresh.v.data_ptr(), fresh.interleaved
        angles = None if fresh.cos is None or fresh.sin is None else (fresh.cos, fresh.sin)
    where, _ = k_bounds.memo(("decode", window, slots), lambda: places(k_bounds, (1,) * slots, window))
    turns = angles_at(angles)
    threads = torch.get_num_threads() if slots * heads * d * where[LONGEST] > SMALL else 1
    same = heads, k.shape[1], d, dv, threads, interleaved, 0, 0, scale, softcap or 0.0, 0.0, 0.0
    _kernel(q.dtype)(_pack(q.data_ptr(), out.data_ptr(), new_k, new_v, *same, *kept_at(k, v), *where, *turns))
    return out


# What `SEEN` lays out, in this order.


def kept_at(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Where k and v [slots or blocks, kv_heads, tokens, d] lie."""
    (k0, k2, k1, _), (v0, v2, v1, _) = k.stride(), v.stride()
    return k.data_ptr(), v.data_ptr(), k0, k1, k2, v0, v1, v2


def places(k_bounds: Bounds, lengths: tuple[int, ...], window: int | None) -> tuple[tuple[int, ...], Tensor]:
    """What each query sees, and a tensor that has to stay as long as this is used. `lengths`: how many of a sequence's
    tokens, the last ones, are queries."""
    paged = isinstance(k_bounds, Pages)  # then tokens are counted from the first one in the table
    firsts, counts, rows = [], [], []
    for row, ((start, length), new) in enumerate(zip(k_bounds.sequences, lengths, strict=True)):
        at = 0 if paged else start % k_bounds.width
        for end in range(length - new + 1, length + 1):
            counts.append(end if window is None else min(window, end))
            firsts.append(at + end - counts[-1])
            rows.append(row)
    held = torch.tensor([firsts, counts, rows])
    at, each = held.data_ptr(), 8 * len(rows)
    tables = pages = page = 0
    if isinstance(k_bounds, Pages):
        tables, pages, page = k_bounds.tables.data_ptr(), k_bounds.tables.shape[1], k_bounds.size
    return (at, at + each, at + 2 * each, tables, len(rows), max(counts), pages, page), held


def angles_at(angles: tuple[Tensor, Tensor] | None) -> tuple[int, ...]:
    """By how much each query turns: cos and sin [B or 1, T, pairs], float32."""
    if angles is None:
        return 0, 0, 0, 0
    rows, width, pairs = angles[0].shape
    return angles[0].data_ptr(), angles[1].data_ptr(), pairs, rows * width

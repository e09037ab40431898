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
LAYOUT = "8P15q4P3q2P4f"  # decode.h's Decode
_pack = Struct(LAYOUT).pack


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
    heads, (slots, dv) = q.shape[2], (q.shape[0], v.shape[3])
    q, out = q.contiguous(), q.new_empty(slots, 1, heads, dv)
    new = fresh and fresh._replace(k=fresh.k.contiguous(), v=fresh.v.contiguous())
    lengths = (1,) * slots
    call = fields(q, k, v, out, lengths, k_bounds, heads, scale=scale, window=window, softcap=softcap, fresh=new)
    _kernel(q.dtype)(_pack(*call))
    return out


def fields(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lengths: tuple[int, ...], k_bounds: Bounds, heads: int, *,
    scale: float, window: int | None, softcap: float | None, fresh: Fresh | None,
    norms: tuple[int, int, float, float] | None = None,
) -> tuple[float, ...]:  # fmt: skip
    """What `LAYOUT` lays out. `lengths`: how many of a sequence's tokens, the last ones, are queries; q holds them in
    their order, and nothing else. Without `out` the caller knows where queries, new keys, values and answers are.
    `norms`: addresses of those of queries and keys, eps and offset."""
    slots, d = sum(lengths), k.shape[3]
    found = k_bounds.memo(("decode", window, lengths), lambda: _seen(lengths, k_bounds, window))
    first, counts, rows, longest, _ = found
    if isinstance(k_bounds, Pages):
        tables, pages, page = k_bounds.tables.data_ptr(), k_bounds.tables.shape[1], k_bounds.size
        kv_heads, dv = v.shape[1], v.shape[3]
        (k0, k2, k1, _), (v0, v2, v1, _) = k.stride(), v.stride()
    else:
        tables = pages = page = 0
        kv_heads, dv = v.shape[2:]
        (k0, k1, k2, _), (v0, v1, v2, _) = k.stride(), v.stride()
    where = new_k = new_v = cos = sin = pairs = turns = 0
    if out is not None:
        where = out.data_ptr()
    if fresh is not None:
        if out is not None:
            new_k, new_v = fresh.k.data_ptr(), fresh.v.data_ptr()
        if fresh.cos is not None and fresh.sin is not None:
            cos, sin, pairs = fresh.cos.data_ptr(), fresh.sin.data_ptr(), fresh.cos.shape[2]
            turns = fresh.cos.shape[0] * fresh.cos.shape[1]
    q_norm, k_norm, eps, offset = norms or (0, 0, 0.0, 0.0)
    threads = torch.get_num_threads() if slots * heads * longest * d > SMALL else 1
    return (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), where, first, counts, rows, tables, slots, heads, kv_heads, d, dv,
        longest, k0, k1, k2, v0, v1, v2, pages, page, threads, new_k, new_v, cos, sin, pairs, turns,
        fresh is not None and fresh.interleaved, q_norm, k_norm, scale, softcap or 0.0, eps, offset,
    )  # fmt: skip


def _seen(lengths: tuple[int, ...], k_bounds: Bounds, window: int | None) -> tuple[int, int, int, int, Tensor]:
    """Addresses of where in its row each query's keys begin, of how many there are, and of the row; the most; what
    holds all three."""
    paged = isinstance(k_bounds, Pages)  # then tokens are counted from the first one in the table
    firsts, counts, rows = [], [], []
    for row, ((start, length), new) in enumerate(zip(k_bounds.sequences, lengths, strict=True)):
        at = 0 if paged else start % k_bounds.width
        for end in range(length - new + 1, length + 1):
            counts.append(end if window is None else min(window, end))
            firsts.append(at + end - counts[-1])
            rows.append(row)
    seen = torch.tensor([firsts, counts, rows])
    return seen[0].data_ptr(), seen[1].data_ptr(), seen[2].data_ptr(), max(counts), seen

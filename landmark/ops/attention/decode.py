"""One query a sequence over a cache of keys and values: a C kernel that needs no mask and repeats no key."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...ctx import Bounds
from ..native import Source

SOURCE = Source(Path(__file__).with_name("decode.c"))
KERNELS = {torch.float32: "decode_f32", torch.bfloat16: "decode_bf16"}
_ARGS = (*[c_void_p] * 6, *[c_int64] * 11, *[c_float] * 2, c_int)
SMALL = 1 << 15  # multiplications below which a second thread costs more than it does


@cache
def _kernel(dtype: torch.dtype):  # type: ignore[no-untyped-def]  # ctypes names no type for its functions
    return SOURCE.function(KERNELS[dtype], *_ARGS)


def why_not(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, k_bounds: Bounds) -> str | None:
    """None if the kernel can serve q [B, 1, heads, d] over k and v [B, S, kv_heads, d], else why not."""
    if not (bounds.width == 1 and bounds.dense and k_bounds.one_a_row and k_bounds.rows == bounds.rows):
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


def decode(
    q: Tensor, k: Tensor, v: Tensor, k_bounds: Bounds, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """softmax(q k^T * scale) v -> [B, 1, heads, d_v], for arguments that `why_not` accepts."""
    slots, _, heads, d = q.shape
    kv_heads, dv = v.shape[2:]
    first, counts = k_bounds.memo(("decode", window), lambda: _seen(k_bounds, window))
    q, out = q.contiguous(), q.new_empty(slots, 1, heads, dv)
    threads = torch.get_num_threads() if slots * heads * k_bounds.longest * d > SMALL else 1
    k_slot, k_token, k_head, _ = k.stride()
    v_slot, v_token, v_head, _ = v.stride()
    _kernel(q.dtype)(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), first.data_ptr(), counts.data_ptr(), slots, heads,
        kv_heads, d, dv, k_slot, k_token, k_head, v_slot, v_token, v_head, scale, softcap or 0.0, threads,
    )  # fmt: skip
    return out


def _seen(k_bounds: Bounds, window: int | None) -> tuple[Tensor, Tensor]:
    """Where in its row each query's keys begin, and how many there are."""
    first, counts = [], []
    for start, length in k_bounds.sequences:
        count = length if window is None else min(window, length)
        first.append(start % k_bounds.width + length - count)
        counts.append(count)
    return torch.tensor(first), torch.tensor(counts)

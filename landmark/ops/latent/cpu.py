"""Latent attention's step for the few tokens of decoding: a C kernel."""

from __future__ import annotations

from ctypes import c_char_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..native import Source

SOURCE = Source(Path(__file__).with_name("latent.c"))
KERNELS = {torch.float32: "latent_f32", torch.bfloat16: "latent_bf16"}
MAX_ROWS = 16  # beyond them batched products are as fast
ONE_THREAD = 2**17  # bytes of weight that a second thread would not read any sooner
_PLAIN = (Tensor, Parameter)
_pack = Struct("8P9q2d").pack  # latent.c's Call


@cache
def _kernel(dtype: torch.dtype) -> Any:
    return SOURCE.function(KERNELS[dtype], c_char_p)


def why_not(q: Tensor, down: Tensor, weight: Tensor, scale: Tensor, cos: Tensor) -> str | None:
    """None if the kernel can run, else why not."""
    dtype = q.dtype
    if dtype not in KERNELS:
        return f"it takes float32 and bfloat16, not {dtype}"
    for t in (q, down, weight, scale, cos):
        if type(t) not in _PLAIN or not t.is_cpu or t.dtype != dtype:
            return f"it takes plain tensors of one dtype on cpu, not {type(t).__name__} {t.dtype} on {t.device.type}"
    if not 0 < (rows := q.shape[0] * q.shape[1]) <= MAX_ROWS:
        return f"it takes 1 to {MAX_ROWS} tokens, not {rows}"
    if cos.shape[0] * cos.shape[1] not in (1, rows):
        return "tokens of several rows share their positions"
    if weight.stride(2) != 1 or weight.stride(1) != weight.shape[2]:
        return "the weight's rows do not lie end to end"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, down, weight, scale, cos)):
        return "it has no gradient"
    if torch.compiler.is_compiling():
        return "compilers do not see through it"
    return SOURCE.why_not()


def absorb(
    q: Tensor, down: Tensor, weight: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, eps: float, offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """For arguments that `why_not` accepts."""
    (rows, width, heads, _), (_, head_dim, rank), half = q.shape, weight.shape, cos.shape[2]
    q, down, scale, cos, sin = (t.contiguous() for t in (q, down, scale, cos, sin))
    y = q.new_empty((rows, width, heads, rank + 2 * half))
    entry = q.new_empty((rows, width, 1, rank + 2 * half))
    call = _pack(
        q.data_ptr(), down.data_ptr(), weight.data_ptr(), scale.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        y.data_ptr(), entry.data_ptr(), rows * width, heads, head_dim, 2 * half, rank, weight.stride(0),
        half if cos.shape[0] * cos.shape[1] > 1 else 0, interleaved,
        torch.get_num_threads() if heads * head_dim * rank * q.itemsize > ONE_THREAD else 1, eps, offset,
    )  # fmt: skip
    _kernel(q.dtype)(call)
    return y, entry

"""Low-rank products for the few rows of decoding, at the speed of reading the factors: a C kernel."""

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

SOURCE = Source(Path(__file__).with_name("low_rank.c"))
KERNELS = {torch.float32: "add_f32", torch.bfloat16: "add_bf16"}
MAX_ROWS, MAX_RANK = 16, 256  # as in low_rank.c
ONE_THREAD = 2**18  # bytes of factors that a second thread would not read any sooner
_PLAIN = (Tensor, Parameter)
_pack = Struct("4P9qd").pack  # low_rank.c's Call


@cache
def _kernel(dtype: torch.dtype) -> Any:
    return SOURCE.function(KERNELS[dtype], c_char_p)


def why_not(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> str | None:
    """None if the kernel can run, else why not."""
    dtype = y.dtype
    for t in (y, x, A, B):
        if type(t) not in _PLAIN or not t.is_cpu or t.dtype != dtype or dtype not in KERNELS:
            return f"it takes plain tensors on cpu, all float32 or all bfloat16, not {t.dtype} on {t.device.type}"
    if not 0 < (rows := x.numel() // max(1, A.shape[1])) <= MAX_ROWS or not 0 < A.shape[0] <= MAX_RANK:
        return f"it takes 1 to {MAX_ROWS} rows and ranks to {MAX_RANK}, not {rows} and {A.shape[0]}"
    if A.stride(1) != 1 or B.stride(0) != 1 or not x.is_contiguous() or not y.is_contiguous():
        return "x, y, rows of A and columns of B must be contiguous"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, A, B)):
        return "it has no gradient"
    if torch.compiler.is_compiling():
        return "compilers do not see through it"
    return SOURCE.why_not()


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """For arguments that `why_not` accepts; into y."""
    (rank, width), out = A.shape, B.shape[0]
    call = _pack(
        x.data_ptr(), A.data_ptr(), B.data_ptr(), y.data_ptr(), x.numel() // width, width, out, rank, width, out,
        A.stride(0), B.stride(1), torch.get_num_threads() if A.nbytes + B.nbytes > ONE_THREAD else 1, scale,
    )  # fmt: skip
    _kernel(y.dtype)(call)
    return y

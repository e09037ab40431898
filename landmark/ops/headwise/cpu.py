"""Linear maps of heads for the few rows of decoding, at memory speed: a C kernel."""

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

SOURCE = Source(Path(__file__).with_name("headwise.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
MAX_ROWS = 16  # beyond them the batched product is as fast
ONE_THREAD = 2**17  # bytes of weight that a second thread would not read any sooner
_PLAIN = (Tensor, Parameter)
_pack = Struct("3P9q").pack  # headwise.c's Call


@cache
def _kernel(columns: bool, dtype: torch.dtype) -> Any:
    return SOURCE.function(f"{'columns' if columns else 'rows'}_{SUFFIX[dtype]}", c_char_p)


def why_not(x: Tensor, weight: Tensor) -> str | None:
    """None if the kernel can run, else why not."""
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or not (x.is_cpu and weight.is_cpu):
        return "it takes plain tensors on cpu"
    if weight.dtype not in SUFFIX or x.dtype != weight.dtype:
        return f"it takes float32 and bfloat16, both alike, not {x.dtype} and {weight.dtype}"
    if not 0 < (rows := x.numel() // max(1, weight.shape[0] * weight.shape[2])) <= MAX_ROWS or not weight.numel():
        return f"it takes 1 to {MAX_ROWS} rows, not {rows}, and no empty tensors"
    if weight.stride(1) != 1 and weight.stride(2) != 1:
        return "neither rows nor columns of the weight are contiguous"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "it has no gradient"
    if torch.compiler.is_compiling():
        return "compilers do not see through it"
    return SOURCE.why_not()


def headwise(x: Tensor, weight: Tensor) -> Tensor:
    """For arguments that `why_not` accepts."""
    heads, out, width = weight.shape
    rows = x.reshape(-1, heads, width)
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    y = x.new_empty(*x.shape[:-1], out)
    columns = weight.stride(2) != 1
    call = _pack(
        rows.data_ptr(), weight.data_ptr(), y.data_ptr(), rows.shape[0], heads, width, out, *rows.stride()[:2],
        weight.stride(0), weight.stride(2 if columns else 1),
        torch.get_num_threads() if weight.nbytes > ONE_THREAD else 1,
    )  # fmt: skip
    _kernel(columns, x.dtype)(call)
    return y

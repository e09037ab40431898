"""Ternary products on the processor: two bits a weight, read once in order, with 8-bit products of whole numbers."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Buffer, Parameter

from ...native import Source
from . import reference

SOURCE = Source(Path(__file__).with_name("ternary.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
PAD = 64  # as in ternary.c
ONE_THREAD = 2**16  # bytes of packed weight, times rows of x, that a second thread would not finish any sooner
_PLAIN = (Tensor, Parameter, Buffer)
_P, _I, _N = c_void_p, c_int64, c_int
_SIGNATURES = {
    "linear": (_P, _P, _P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _N, _N, _N),
    "pack": (_P, _P, _P, _I, _I, _N),
}


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    return SOURCE.function(f"{name}_{SUFFIX[dtype]}", *_SIGNATURES[name])


def why_not(x: Tensor, *others: Tensor | None) -> str | None:
    """None if the kernels can run on x and the float tensors that go with it, else why not."""
    for t in (x, *others):
        if t is not None and (type(t) not in _PLAIN or not t.is_cpu or t.dtype not in SUFFIX):
            return f"it takes plain float32 and bfloat16 tensors on cpu, not {type(t).__name__} {t.dtype} on {t.device}"
    if x.numel() == 0:
        return "it takes no empty tensors"
    return SOURCE.why_not()


def linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, out: int, reciprocal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.linear`; the bias has the dtype of x."""
    width = packed.shape[1]
    x, packed = x.contiguous(), packed.contiguous()
    rows, padded = x.numel() // width, -(-width // PAD) * PAD
    numbers = torch.empty(*x.shape[:-1], padded, dtype=torch.int8)
    factor = torch.empty(*x.shape[:-1], 1, dtype=torch.float32)
    sums = torch.empty(rows, dtype=torch.int32)
    y = torch.empty(*x.shape[:-1], out, dtype=x.dtype)
    bias = bias if bias is None else bias.contiguous()
    threads = torch.get_num_threads() if rows * packed.numel() > ONE_THREAD else 1
    _kernel("linear", x.dtype)(
        x.data_ptr(), numbers.data_ptr(), factor.data_ptr(), sums.data_ptr(), packed.data_ptr(), scale.data_ptr(),
        None if bias is None else bias.data_ptr(), y.data_ptr(), rows, out, width, padded, reciprocal,
        scale.dtype == torch.bfloat16, threads,
    )  # fmt: skip
    return y, numbers[..., :width], factor


def pack(weight: Tensor, scale: Tensor) -> Tensor:
    """`reference.pack(reference.ternary(weight, scale))` in one pass; scale is float32."""
    (out, width), weight = weight.shape, weight.contiguous()
    packed = torch.empty(-(-out // reference.PER_BYTE), width, dtype=torch.uint8)
    threads = torch.get_num_threads() if packed.numel() > ONE_THREAD else 1
    _kernel("pack", weight.dtype)(weight.data_ptr(), scale.data_ptr(), packed.data_ptr(), out, width, threads)
    return packed

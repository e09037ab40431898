"""Linear maps whose weights are codes of 4 or 8 bits in groups of 32: read at memory speed where rows are few.

Up to `MAX_ROWS` rows meet weights that are restored in registers, in the precision of x; more rows a weight that is
restored in memory, which is the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...inference import inference_op
from ...native import Source
from . import reference
from .reference import GROUP, STEP, Bits, quantise

Backend = Literal["reference", "few", "restored"]
SOURCE = Source(Path(__file__).with_name("grouped.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
MAX_ROWS = 16
ONE_THREAD = 2**17  # bytes of codes that a second thread would not read any sooner


def why_not(backend: Backend, x: Tensor, codes: Tensor) -> str | None:
    """None if `backend` can run, else why not."""
    if backend not in ("reference", "few", "restored"):
        raise ValueError(f"unknown backend {backend!r}: use 'reference', 'few' or 'restored'")
    if backend == "reference":
        return None
    if not (x.is_cpu and codes.is_cpu):
        return f"it runs on cpu, not {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {x.dtype}"
    if backend == "few":
        if torch.is_grad_enabled() and x.requires_grad:
            return "it has no gradient"
        if not 0 < (rows := x.numel() // max(1, x.shape[-1])) <= MAX_ROWS:
            return f"it takes 1 to {MAX_ROWS} rows, not {rows}"
    return SOURCE.why_not()


def linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: Bits, *, backend: Backend | None = None
) -> Tensor:
    """y = x W^T + b; x [..., in], codes uint8 [out, bytes] and scales float16 [out, groups] as `quantise` makes them,
    bias [out] of x's type -> [..., out]. Differentiable in x."""
    if backend is not None:
        if (reason := why_not(backend, x, codes)) is not None:
            raise ValueError(f"backend {backend!r} cannot run: {reason}")
        return _RUN[backend](x, codes, scales, bias, bits)
    if why_not("few", x, codes) is None:
        return few(x, codes, scales, bias, bits)
    if why_not("restored", x, codes) is None:
        return _restored(x, codes, scales, bias, bits)
    return reference.linear(x, codes, scales, bias, bits)


def restore(codes: Tensor, scales: Tensor, bits: Bits, width: int, dtype: torch.dtype) -> Tensor:
    """The weight [out, width] that codes and scales stand for."""
    if codes.is_cpu and dtype in (torch.float32, torch.bfloat16) and SOURCE.why_not() is None:
        return _restore(codes, scales, bits, width, dtype)
    return reference.restore(codes, scales, bits, width, dtype)


def _restored(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: Bits) -> Tensor:
    return F.linear(x, _restore(codes, scales, bits, x.shape[-1], x.dtype), bias)


@cache
def _kernel(bits: int, dtype: torch.dtype) -> Any:
    return SOURCE.function(f"grouped{bits}_{SUFFIX[dtype]}", *[c_void_p] * 5, *[c_int64] * 3, c_int)


def _few(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    x, out = x.contiguous(), codes.shape[0]
    y = torch.empty((*x.shape[:-1], out), dtype=x.dtype)
    threads = torch.get_num_threads() if codes.numel() > ONE_THREAD else 1
    _kernel(bits, x.dtype)(
        x.data_ptr(), codes.data_ptr(), scales.data_ptr(), None if bias is None else bias.contiguous().data_ptr(),
        y.data_ptr(), x.numel() // x.shape[-1], out, x.shape[-1], threads,
    )  # fmt: skip
    return y


def _fake(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


few = inference_op("grouped_few", _few, _fake)


@torch.library.custom_op("landmark::grouped_restore", mutates_args=())
def _restore(codes: Tensor, scales: Tensor, bits: int, width: int, dtype: torch.dtype) -> Tensor:
    y = torch.empty(codes.shape[0], width, dtype=dtype)
    kernel = SOURCE.function(f"restore{bits}_{SUFFIX[dtype]}", *[c_void_p] * 3, *[c_int64] * 2, c_int)
    threads = torch.get_num_threads() if codes.numel() > ONE_THREAD else 1
    kernel(codes.data_ptr(), scales.data_ptr(), y.data_ptr(), codes.shape[0], width, threads)
    return y


@_restore.register_fake
def _(codes: Tensor, scales: Tensor, bits: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(codes.shape[0], width, dtype=dtype, device=codes.device)


_RUN: dict[Backend, Callable[[Tensor, Tensor, Tensor, Tensor | None, Bits], Tensor]] = {
    "reference": reference.linear,
    "few": few,
    "restored": _restored,
}

__all__ = ["GROUP", "STEP", "Backend", "Bits", "linear", "quantise", "reference", "restore", "why_not"]

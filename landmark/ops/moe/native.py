"""Grouped products by a C kernel (grouped.c): every expert's rows in one call, whether they are one or a thousand."""

from __future__ import annotations

from ctypes import POINTER, byref, c_char_p, c_int
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..native import Source
from ..operator import Operator
from .loop import again, setup

SOURCE = Source(Path(__file__).with_name("grouped.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
ONE_THREAD = 2**16  # multiplications that a second thread would not finish any sooner
_PLAIN = (Tensor, Parameter)
_pack = Struct("5P5q").pack  # grouped.c's Call


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    return SOURCE.function(f"grouped_{name}_{SUFFIX[dtype]}", c_char_p)


@cache
def _pairs() -> bool:
    has = c_int()
    SOURCE.function("grouped_pairs", POINTER(c_int))(byref(has))
    return bool(has.value)


def why_not(x: Tensor, weight: Tensor) -> str | None:
    """None if the kernel can run, else why not."""
    if not (x.is_cpu and weight.is_cpu):
        return f"it runs on cpu, not {x.device.type}"
    if x.dtype not in SUFFIX or x.dtype != weight.dtype:
        return f"it takes float32 and bfloat16, not {x.dtype} and {weight.dtype}"
    if type(x) not in _PLAIN or type(weight) not in _PLAIN:
        return f"it takes plain tensors, not {type(x).__name__} and {type(weight).__name__}"
    if not weight.is_contiguous():
        return "the weight is not contiguous"
    if torch.is_autocast_enabled("cpu"):
        return "autocast picks the dtype"
    if (reason := SOURCE.why_not()) is not None:
        return reason
    if x.dtype == torch.bfloat16:
        if not _pairs():
            return "this processor has no products of bfloat16"
        if weight.shape[1] % 2 or weight.shape[2] % 2:
            return f"it takes even sizes in bfloat16, not {weight.shape[1]} and {weight.shape[2]}"
    return None


def _run(name: str, x: Tensor | None, weight: Tensor | None, grad: Tensor | None, counts: Tensor, y: Tensor) -> None:
    experts, out, width = (weight if weight is not None else y).shape
    rows = (x if x is not None else y).shape[0]
    threads = torch.get_num_threads() if rows * out * width > ONE_THREAD else 1
    call = _pack(
        *(0 if t is None else t.data_ptr() for t in (x, weight, grad)), y.data_ptr(), counts.data_ptr(), experts, rows,
        width, out, threads,
    )  # fmt: skip
    _kernel(name, y.dtype)(call)


def _forward(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    x, y = x.contiguous(), x.new_empty(x.shape[0], weight.shape[1])
    _run("forward", x, weight, None, counts, y)
    return y


def _grad_x(grad: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    grad, y = grad.contiguous(), grad.new_empty(grad.shape[0], weight.shape[2])
    _run("rows", None, weight, grad, counts, y)
    return y


def _grad_weight(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    grad, x, y = grad.contiguous(), x.contiguous(), x.new_empty(counts.numel(), grad.shape[1], x.shape[1])
    _run("weight", x, None, grad, counts, y)
    return y


grouped_native = Operator(
    "grouped_native",
    _forward,
    lambda x, weight, counts: x.new_empty(x.shape[0], weight.shape[1]),
)
_native_x = Operator(
    "grouped_native_x",
    _grad_x,
    lambda grad, weight, counts: grad.new_empty(grad.shape[0], weight.shape[2]),
)
_native_weight = Operator(
    "grouped_native_weight",
    _grad_weight,
    lambda grad, x, counts: x.new_empty(counts.numel(), grad.shape[1], x.shape[1]),
)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, counts = ctx.saved_tensors
    if torch.is_grad_enabled():
        return again((x, weight, counts), grad)
    need_x, need_weight, _ = ctx.needs_input_grad
    return (
        _native_x(grad, weight, counts) if need_x else None,
        _native_weight(grad, x, counts) if need_weight else None,
        None,
    )


grouped_native.register_autograd(_backward, setup_context=setup)

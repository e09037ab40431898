"""Rows of a table by number on the processor: dots, sums, and the gradient of both, without copies of the rows."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import Parameter

from ..native import Source
from ..operator import operator

SOURCE = Source(Path(__file__).with_name("experts.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
ONE_THREAD = 2**14  # numbers of the table that a second thread would not read any sooner
_PLAIN = (Tensor, Parameter)
_P, _I, _N = c_void_p, c_int64, c_int
_SIGNATURES = {
    "gather_dot": (_P, _P, _P, _P, _I, _I, _I, _N),
    "gather_sum": (_P, _P, _P, _P, _I, _I, _I, _N),
    "scatter": (_P, _P, _P, _P, _P, _P, _I, _I, _I, _N),
}


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    return SOURCE.function(f"{name}_{SUFFIX[dtype]}", *_SIGNATURES[name])


def why_not(x: Tensor, table: Tensor) -> str | None:
    """None if the kernels can run on tokens x and a table, else why not."""
    for t in (x, table):
        if type(t) not in _PLAIN or not t.is_cpu or t.dtype not in SUFFIX:
            return f"it takes plain float32 and bfloat16 tensors on cpu, not {type(t).__name__} {t.dtype} on {t.device}"
    if x.dtype != table.dtype:
        return f"x is {x.dtype} and the table {table.dtype}"
    if x.numel() == 0:
        return "it takes no empty tensors"
    return SOURCE.why_not()


def _threads(at: Tensor, width: int) -> int:
    return torch.get_num_threads() if at.numel() * width > ONE_THREAD else 1


def _dot(x: Tensor, table: Tensor, at: Tensor) -> Tensor:
    x, table, at = x.contiguous(), table.contiguous(), at.contiguous()
    y = torch.empty(at.shape, dtype=torch.float32)
    _kernel("gather_dot", x.dtype)(
        x.data_ptr(), table.data_ptr(), at.data_ptr(), y.data_ptr(), *at.shape, x.shape[1], _threads(at, x.shape[1])
    )
    return y


def _sum(a: Tensor, table: Tensor, at: Tensor) -> Tensor:
    a, table, at = a.float().contiguous(), table.contiguous(), at.contiguous()
    y, width = torch.empty(at.shape[0], table.shape[1], dtype=table.dtype), table.shape[1]
    _kernel("gather_sum", table.dtype)(
        a.data_ptr(), table.data_ptr(), at.data_ptr(), y.data_ptr(), *at.shape, width, _threads(at, width)
    )
    return y


def _table_grad(a: Tensor, x: Tensor, table: Tensor, at: Tensor) -> Tensor:
    """The table's gradient where a [N, m] and x [N, D] met at its rows; each row is summed in the order of tokens."""
    x, a = x.contiguous(), a.float().contiguous()
    plain = numpy.zeros(table.shape, numpy.uint16 if table.dtype == torch.bfloat16 else numpy.float32)
    grad = torch.from_numpy(plain).view(table.dtype)  # unlike torch's zeros, it takes memory as rows are written
    numbers, order = at.flatten().sort(stable=True)
    experts, counts = torch.unique_consecutive(numbers, return_counts=True)
    ends = counts.cumsum(0)
    _kernel("scatter", x.dtype)(
        a.data_ptr(), x.data_ptr(), order.data_ptr(), experts.data_ptr(), ends.data_ptr(), grad.data_ptr(),
        experts.numel(), at.shape[1], x.shape[1], _threads(at, x.shape[1]),
    )  # fmt: skip
    return grad


@operator("gather_dot")
def gather_dot(x: Tensor, table: Tensor, at: Tensor) -> Tensor:
    """As `reference.gather_dot`, in float32."""
    return _dot(x, table, at)


@operator("gather_sum")
def gather_sum(a: Tensor, table: Tensor, at: Tensor) -> Tensor:
    """As `reference.gather_sum`."""
    return _sum(a, table, at)


@operator("peer_table_grad")
def table_grad(a: Tensor, x: Tensor, table: Tensor, at: Tensor) -> Tensor:
    return _table_grad(a, x, table, at)


@gather_dot.register_fake
def _(x: Tensor, table: Tensor, at: Tensor) -> Tensor:
    return x.new_empty(at.shape, dtype=torch.float32)


@gather_sum.register_fake
def _(a: Tensor, table: Tensor, at: Tensor) -> Tensor:
    return table.new_empty(at.shape[0], table.shape[1])


@table_grad.register_fake
def _(a: Tensor, x: Tensor, table: Tensor, at: Tensor) -> Tensor:
    return torch.empty_like(table)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _dot_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, table, at = ctx.saved_tensors
    need_x, need_table, _ = ctx.needs_input_grad
    grad_x = gather_sum(grad, table, at) if need_x else None
    return grad_x, table_grad(grad, x, table, at) if need_table else None, None


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, table, at = ctx.saved_tensors
    need_a, need_table, _ = ctx.needs_input_grad
    grad_a = gather_dot(grad, table, at).to(a.dtype) if need_a else None
    return grad_a, table_grad(a, grad, table, at) if need_table else None, None


gather_dot.register_autograd(_dot_backward, setup_context=_setup)
gather_sum.register_autograd(_sum_backward, setup_context=_setup)

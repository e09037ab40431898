"""RMSNorm, gated activations and rotary embedding as C kernels, forward and backward each one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..activation import ACTIVATIONS
from ..inference import learns
from ..native import Source
from ..operator import Operator
from . import reference

SOURCE = Source(Path(__file__).with_name("block.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
KINDS = {name: kind for kind, name in enumerate(ACTIVATIONS)}  # as block.c's enum
ONE_THREAD = 2**14  # elements that a second thread would not finish any sooner
_PLAIN = (Tensor, Parameter)
_P, _I, _N, _F = c_void_p, c_int64, c_int, c_float
_SIGNATURES = {
    "rms_norm": (_P, _P, _N, _P, _P, _I, _I, _I, _F, _F, _N),
    "rms_norm_backward": (_P, _P, _N, _P, _P, _P, _P, _I, _I, _I, _F, _N),
    "glu": (_P, _P, _P, _I, _I, _I, _I, _N, _N),
    "glu_backward": (_P, _P, _P, _P, _P, _I, _I, _I, _I, _N, _N),
    "rotary": (_P, _P, _P, _P, *[_I] * 9, _F, _N, _N),
}


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    return SOURCE.function(f"{name}_{SUFFIX[dtype]}", *_SIGNATURES[name])


def why_not(x: Tensor, *others: Tensor | None) -> str | None:
    """None if the kernels can run on x and what goes with it, else why not."""
    if not x.is_cpu:
        return f"it runs on cpu, not {x.device.type}"
    if x.dtype not in SUFFIX:
        return f"it takes float32 and bfloat16, not {x.dtype}"
    if x.numel() == 0:
        return "it takes no empty tensors"
    for t in (x, *others):
        if t is not None and (type(t) not in _PLAIN or not t.is_cpu or t.dtype not in SUFFIX):
            return f"it takes plain float32 and bfloat16 tensors on cpu, not {type(t).__name__} {t.dtype} on {t.device}"
    return SOURCE.why_not()


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > ONE_THREAD else 1


def _is_half(weight: Tensor | None) -> bool:
    return weight is not None and weight.dtype == torch.bfloat16


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x with unit stride within rows and one stride between them, and that stride."""
    width = x.shape[-1]
    if not x.is_contiguous():
        try:
            rows = x.view(-1, width)
        except RuntimeError:  # no single stride between rows
            return x.contiguous(), width
        if rows.stride(1) == 1:
            return rows, rows.stride(0)
    return x.contiguous(), width


def _direct(op: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, or what it runs, five microseconds sooner, where neither a gradient nor a compiler looks on."""

    def call(*args: Any) -> Any:
        return (op if torch.compiler.is_compiling() or learns(*args) else run)(*args)

    return call


def _again(equation: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], grad: Tensor) -> list[Tensor | None]:
    """Gradients that can be differentiated again (create_graph=True), by the reference."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(equation(*inputs), wanted, grad, create_graph=True))
    return [next(grads) if t is not None and t.requires_grad else None for t in inputs]


# RMSNorm


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, groups: int) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    weight = None if weight is None else weight.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    y, rstd = torch.empty_like(x), torch.empty((rows, groups), dtype=torch.float32)
    _kernel("rms_norm", x.dtype)(
        x.data_ptr(), None if weight is None else weight.data_ptr(), _is_half(weight), y.data_ptr(), rstd.data_ptr(),
        rows, groups, width // groups, eps, offset, _threads(x),
    )  # fmt: skip
    return y, rstd


def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, groups: int, need_weight: bool
) -> tuple[Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    weight = None if weight is None else weight.contiguous()
    width = x.shape[-1]
    grad_x, grad_weight = torch.empty_like(x), torch.empty(width if need_weight else 0, dtype=torch.float32)
    _kernel("rms_norm_backward", x.dtype)(
        x.data_ptr(), None if weight is None else weight.data_ptr(), _is_half(weight), rstd.data_ptr(), grad.data_ptr(),
        grad_x.data_ptr(), grad_weight.data_ptr() if need_weight else None, x.numel() // width, groups,
        width // groups, offset, _threads(x),
    )  # fmt: skip
    return grad_x, grad_weight


_rms_norm_op = Operator(
    "rms_norm",
    _rms_norm,
    lambda x, weight, eps, offset, groups: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((x.numel() // x.shape[-1], groups), dtype=torch.float32),
    ),
)
_rms_norm_grads = Operator(
    "rms_norm_backward",
    _rms_norm_backward,
    lambda grad, x, weight, rstd, offset, groups, need_weight: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(x.shape[-1] if need_weight else 0, dtype=torch.float32),
    ),
)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.eps, ctx.offset, ctx.groups = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _rms_norm_vjp(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():
        equation = lambda x, weight: reference.rms_norm(x, weight, ctx.eps, ctx.offset, ctx.groups)
        return (*_again(equation, (x, weight), grad), None, None, None)
    need = weight is not None and ctx.needs_input_grad[1]
    grad_x, grad_weight = _rms_norm_grads(grad, x, weight, rstd, ctx.offset, ctx.groups, need)
    return grad_x, grad_weight.to(weight.dtype) if need else None, None, None, None


_rms_norm_op.register_autograd(_rms_norm_vjp, setup_context=_rms_norm_setup)


# Activations, alone (`up` is None) or gating


def _glu(gate: Tensor, up: Tensor | None, act: str, inplace: bool = False) -> Tensor:
    reused = inplace and gate.is_contiguous()
    y = gate if reused else torch.empty_like(gate, memory_format=torch.contiguous_format)
    (gate, gate_ld), (up, up_ld) = _rows(gate), (None, 0) if up is None else _rows(up)
    n = y.shape[-1]
    _kernel("glu", y.dtype)(
        gate.data_ptr(), None if up is None else up.data_ptr(), y.data_ptr(), y.numel() // n, n, gate_ld, up_ld,
        KINDS[act], _threads(y),
    )  # fmt: skip
    return y


def _glu_backward(grad: Tensor, gate: Tensor, up: Tensor | None, act: str) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    grad_gate, grad_up = torch.empty_like(grad), torch.empty_like(grad) if up is not None else grad.new_empty(0)
    (gate, gate_ld), (up, up_ld) = _rows(gate), (None, 0) if up is None else _rows(up)
    n = grad.shape[-1]
    _kernel("glu_backward", grad.dtype)(
        gate.data_ptr(), None if up is None else up.data_ptr(), grad.data_ptr(), grad_gate.data_ptr(),
        grad_up.data_ptr(), grad.numel() // n, n, gate_ld, up_ld, KINDS[act], _threads(grad),
    )  # fmt: skip
    return grad_gate, grad_up


_glu_op = Operator(
    "glu",
    _glu,
    lambda gate, up, act: torch.empty_like(gate, memory_format=torch.contiguous_format),
)
_glu_grads = Operator(
    "glu_backward",
    _glu_backward,
    lambda grad, gate, up, act: (
        torch.empty_like(grad, memory_format=torch.contiguous_format),
        grad.new_empty(0) if up is None else torch.empty_like(grad, memory_format=torch.contiguous_format),
    ),
)


def _glu_setup(ctx: Any, inputs: tuple[Tensor, Tensor | None, str], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.act = inputs[2]


def _glu_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    if torch.is_grad_enabled():
        return (*_again(lambda gate, up: reference.glu(gate, up, ctx.act), (gate, up), grad), None)
    grad_gate, grad_up = _glu_grads(grad, gate, up, ctx.act)
    return grad_gate, None if up is None else grad_up, None


_glu_op.register_autograd(_glu_vjp, setup_context=_glu_setup)


# Rotary embedding


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos, sin = (t.to(torch.float32).contiguous() for t in (cos, sin))
    y = torch.empty(x.shape, dtype=x.dtype)
    step = 0 if cos.shape[0] == 1 else cos.shape[1] * cos.shape[2]
    _kernel("rotary", x.dtype)(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), *x.shape, cos.shape[-1], *x.stride()[:3], step,
        -1.0 if inverse else 1.0, interleaved, _threads(x),
    )  # fmt: skip
    return y


_rotary_op = Operator(
    "rotary",
    _rotary,
    lambda x, cos, sin, interleaved, inverse: x.new_empty(x.shape),
)


def _rotary_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotary_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _rotary_op(grad, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None


_rotary_op.register_autograd(_rotary_vjp, setup_context=_rotary_setup)


def glu(gate: Tensor, up: Tensor | None, act: str, inplace: bool = False) -> Tensor:
    """As `_direct` has it."""
    if torch.compiler.is_compiling() or learns(gate, up):
        result: Tensor = _glu_op(gate, up, act)
        return result
    return _glu(gate, up, act, inplace)


rms_norm, rotary = _direct(_rms_norm_op, _rms_norm), _direct(_rotary_op, _rotary)

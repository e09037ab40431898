"""BitNet b1.58 (Ma et al. 2024): ternary weights by their mean absolute value, activations of 8 bits a token.

`bit_linear` is what is trained: a weight in full precision, rounded on the way. `ternary_linear` is what is used
afterwards: the rounded weight alone, two bits each. The two compute the same sums of whole numbers, and are equal.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...linear import linear
from ...native import transformed
from ...operator import Operator, operator
from . import cpu, reference
from .reference import absmean, pack, quantise_tokens, ternary, unpack

Backend = Literal["reference", "cpu"]


def why_not(backend: Backend, x: Tensor, *others: Tensor | None) -> str | None:
    """None if `backend` can run on x and the float tensors that go with it, else why not."""
    if backend not in ("reference", "cpu"):
        raise ValueError(f"unknown backend {backend!r}: use 'reference' or 'cpu'")
    return cpu.why_not(x, *others) if backend == "cpu" else None


def ternary_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None, *, out: int, reciprocal: bool = False,
    backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """x [..., in], packed uint8 [ceil(out / 4), in] (see `pack`), scale [1], bias [out] -> [..., out].

    The weight is the packed one times `scale`, or divided by it if `reciprocal` (both are published). Gradients reach
    x, straight through its rounding, and the bias.
    """
    _check(backend, x, scale, bias)
    if transformed():
        return _straight(x, unpack(packed, out) * (1 / scale if reciprocal else scale), bias)
    y: Tensor = _ternary_linear(x, packed, scale, bias, out, reciprocal, backend)
    return y


def bit_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out]: both rounded, differentiable straight through.

    Gradients are those of a linear map with the rounded x and the rounded weight (Bengio et al. 2013). What is kept for
    them takes one byte a number of x and two bits a weight.
    """
    _check(backend, x, weight, bias)
    if transformed():
        scale = absmean(weight.detach())
        return _straight(x, weight + (ternary(weight.detach(), scale) * scale - weight).detach(), bias)
    y: Tensor = _bit_linear(x, weight, bias, backend)[0]
    return y


def _straight(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same map of x rounded, as torch.func and forward-mode derivatives see through it."""
    numbers, factor = quantise_tokens(x.detach())
    rounded = x + (numbers / factor - x).detach()
    return F.linear(rounded.to(x.dtype), weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _check(backend: Backend | None, x: Tensor, *others: Tensor | None) -> None:
    if backend is not None and (reason := why_not(backend, x, *others)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")


def _run(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, out: int, reciprocal: bool, backend: str | None
) -> Tensor:
    fast = backend != "reference" and cpu.why_not(x, scale, bias) is None
    bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
    return (cpu if fast else reference).linear(x, packed, scale, bias, out, reciprocal)[0]


def _fake(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, out: int, reciprocal: bool, backend: str | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


def _setup_ternary(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, _, _, reciprocal, _ = inputs
    ctx.save_for_backward(packed, scale)
    ctx.reciprocal = reciprocal


def _backward_ternary(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, scale = ctx.saved_tensors
    need_x, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    grad_x = _times(grad, packed, 1 / scale if ctx.reciprocal else scale) if need_x else None
    return grad_x, None, None, grad.flatten(0, -2).sum(0) if need_bias else None, None, None, None


def _times(grad: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """grad [..., out] times the rounded weight, [..., in]."""
    return linear(grad, (unpack(packed, grad.shape[-1]).to(grad.dtype) * scale.to(grad.dtype)).mT)


_ternary_linear = Operator("ternary_linear", _run, _fake)
_ternary_linear.register_autograd(_backward_ternary, setup_context=_setup_ternary)


@operator("bit_linear")
def _bit_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and what the backward pass needs: x as numbers and factors, the weight packed and its scale."""
    scale = absmean(weight)
    fast = backend != "reference" and cpu.why_not(x, weight, bias) is None
    packed = cpu.pack(weight, scale) if fast else pack(ternary(weight, scale))
    run = cpu.linear if fast else reference.linear
    y, numbers, factor = run(x, packed, scale, bias if bias is None else bias.to(x.dtype), weight.shape[0], False)
    return y, numbers.contiguous(), factor, packed, scale


@_bit_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> tuple[Tensor, ...]:
    (out, width), wide = weight.shape, reference.wide(x)
    return (
        x.new_empty(*x.shape[:-1], out),
        x.new_empty(*x.shape[:-1], width, dtype=torch.int8),
        x.new_empty(*x.shape[:-1], 1, dtype=wide),
        weight.new_empty(-(-out // reference.PER_BYTE), width, dtype=torch.uint8),
        weight.new_empty(1, dtype=reference.wide(weight)),
    )


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, str | None], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    numbers, factor, packed, scale = ctx.saved_tensors
    need_x, need_weight, need_bias, _ = ctx.needs_input_grad
    x_dtype, weight_dtype = ctx.dtypes
    grad_x = grad_weight = None
    if need_x:
        grad_x = _times(grad, packed, scale).to(x_dtype)
    if need_weight:
        rows = (grad / factor).to(grad.dtype).flatten(0, -2)
        grad_weight = linear(rows.mT, numbers.flatten(0, -2).to(grad.dtype).mT).to(weight_dtype)
    return grad_x, grad_weight, grad.flatten(0, -2).sum(0) if need_bias else None, None


_bit_linear.register_autograd(_backward, setup_context=_setup)

__all__ = [
    "Backend",
    "absmean",
    "bit_linear",
    "pack",
    "quantise_tokens",
    "ternary",
    "ternary_linear",
    "unpack",
    "why_not",
]

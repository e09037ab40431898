"""Grouped products without kernels of our own: one product an expert inside one op, or torch's own grouped product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linear import linear
from ..operator import operator
from . import reference


@operator("grouped_loop")
def grouped_loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [M, in] sorted by expert, weight [E, out, in] of any strides, counts [E] -> [M, out]; differentiable."""
    y, at = x.new_empty(x.shape[0], weight.shape[1]), 0
    with torch.no_grad():
        for e, n in enumerate(counts.tolist()):
            if n:
                y[at : at + n] = linear(x[at : at + n], weight[e])
                at += n
    return y


@operator("grouped_outer")
def grouped_outer(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """grad [M, out], x [M, in], both sorted by expert, counts [E] -> each expert's grad^T x, [E, out, in]."""
    outer, at = x.new_zeros(counts.numel(), grad.shape[1], x.shape[1]), 0
    with torch.no_grad():
        for e, n in enumerate(counts.tolist()):
            if n:
                outer[e] = linear(grad[at : at + n].mT, x[at : at + n].mT)
                at += n
    return outer


@grouped_loop.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.numel(), grad.shape[1], x.shape[1])


def setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def again(inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again (create_graph=True), by the reference."""
    wanted = [t for t in inputs[:2] if t.requires_grad]
    grads = iter(torch.autograd.grad(reference.grouped_linear(*inputs), wanted, grad, create_graph=True))
    return (*(next(grads) if t.requires_grad else None for t in inputs[:2]), None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, counts = ctx.saved_tensors
    if torch.is_grad_enabled():
        return again((x, weight, counts), grad)
    need_x, need_weight, _ = ctx.needs_input_grad
    return (
        grouped_loop(grad, weight.mT, counts) if need_x else None,
        grouped_outer(grad.contiguous(), x, counts) if need_weight else None,
        None,
    )


grouped_loop.register_autograd(_backward, setup_context=setup)


def why_not_grouped_mm(x: Tensor, weight: Tensor) -> str | None:
    """None if torch's grouped product can run, else why not."""
    if x.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {x.dtype}"
    if weight.shape[1] % 8 or weight.shape[2] % 8:
        return f"it takes sizes that 8 divides, not {weight.shape[1]} and {weight.shape[2]}"
    return None


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """As `grouped_linear`, without waiting for the device."""
    return torch._grouped_mm(x, weight.mT, counts.cumsum(0).to(torch.int32))

"""Residual sublayers of few tokens that are one call of a kernel, and what their modules have to be for that.

A function that can be such a call has a method `step(x, norm, scale, ctx, state)`: x + scale f(norm(x)), or None where
it has to be computed module by module.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from ..ctx import Ctx
from ..ops import step
from ..ops.linear import cpu
from ..ops.quant.codes import kind as coded_kind
from .codes import CodedLinear
from .linear import Linear, unhooked
from .norm import RMSNorm

PLAIN = (Tensor, Parameter)


def sublayer(fn: nn.Module, x: Tensor, norm: nn.Module, scale: float, ctx: Ctx, state: Any) -> Tensor | None:
    """x + scale fn(norm(x)) in one call, or None."""
    step_of = getattr(type(fn), "step", None)
    if step_of is None or fn.training or not few(x, ctx) or not unhooked(fn) or (normed := rms_norm(x, norm)) is None:
        return None
    stepped: Tensor | None = step_of(fn, x, normed, scale, ctx, state)
    return stepped


def few(x: Tensor, ctx: Ctx) -> bool:
    """Whether x, of a pass that goes on from a state, has so few tokens that the kernel can run."""
    return ctx.memo(("step", x.dtype, x.shape), lambda: ctx.past is not None and step.why_not(x) is None)


def rms_norm(x: Tensor, module: nn.Module) -> step.Norm | None:
    """A norm as the kernel takes it, else None."""
    if type(module) is not RMSNorm or module.groups != 1 or not unhooked(module):
        return None
    weight = module.weight
    return step.Norm(weight, module.eps, module.offset) if weight.dtype == x.dtype and type(weight) in PLAIN else None


def together(x: Tensor, *modules: nn.Module) -> list[step.Map] | None:
    """Linear maps of one input as the kernel takes them; None if they are of several kinds, or one cannot be."""
    found: list[step.Map] = []
    for module in modules:
        one = linear(x, module)
        if one is None or (found and one.kind != found[0].kind):
            return None
        found.append(one)
    return found


def linear(x: Tensor, module: nn.Module) -> step.Map | None:
    """A linear map as the kernel takes it, else None. What is found of a weight is kept as long as it stays there."""
    weight: Tensor | None
    if type(module) is Linear:
        weight = module._parameters["weight"]
    elif type(module) is CodedLinear:
        weight = module._buffers["codes"]
    else:
        return None
    assert weight is not None
    bias = module.bias
    where = weight.data_ptr(), _at(bias), x.dtype
    kept = module.__dict__.get("_map")
    if kept is None or kept[0] != where or kept[1] is not weight or kept[2] is not bias:
        found = _plain(x, module) if type(module) is Linear else _coded(x, module)
        kept = module.__dict__["_map"] = where, weight, bias, found
    return kept[3] if not module._forward_hooks and not module._forward_pre_hooks else None


def _plain(x: Tensor, module: nn.Module) -> step.Map | None:
    assert isinstance(module, Linear)
    w, kind = module.weight, cpu.kind(x.dtype)
    if w.dtype != x.dtype or w.stride(1) != 1 or type(w) not in PLAIN or kind is None or not _fits(x, module.bias):
        return None
    return step.Map(kind, (w.data_ptr(), 0, _at(module.bias), 0, w.shape[0], w.stride(0)), w.shape[1], w.nbytes)


def _coded(x: Tensor, module: nn.Module) -> step.Map | None:
    assert isinstance(module, CodedLinear)
    codes, kind = module.codes, coded_kind(module.bits, x.dtype, module.round_x)
    if kind is None or not codes.is_cpu or not _fits(x, module.bias):
        return None
    fields = codes.data_ptr(), module.side.data_ptr(), _at(module.bias), 0, module.rows, 0
    return step.Map(kind, fields, module.width, codes.numel())


def _fits(x: Tensor, bias: Tensor | None) -> bool:
    return bias is None or (bias.dtype == x.dtype and bias.stride(0) == 1)


def _at(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.data_ptr()

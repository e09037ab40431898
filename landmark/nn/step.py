"""Residual sublayers of few tokens that are one call of a kernel, and what their modules have to be for that.

A function f that can be such a call has two methods. `step_call(x, norm)` says what of the call stays the same from
token to token; None where its modules are others than the kernel knows. `step(x, call, scale, ctx, state)` is
x + scale f(norm(x)), or None where it has to be computed module by module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from ..ctx import Ctx
from ..ops import step
from ..ops.linear import cpu
from ..ops.quant.codes import kind as coded_kind
from .codes import CodedLinear
from .linear import Linear, unhooked
from .norm import RMSNorm

PLAIN = (Tensor, Parameter)


def sublayer(owner: nn.Module, x: Tensor, ctx: Ctx, state: Any) -> Tensor | None:
    """x + scale fn(norm(x)) in one call, or None; `owner` has all three."""
    if owner.training or not few(x, ctx):
        return None
    kept: Kept | None = owner.__dict__.get("_kept")
    if kept is None or not kept.holds(x.dtype):
        kept = owner.__dict__["_kept"] = Kept(owner, x)
    if kept.call is None or kept.step is None:
        return None
    return kept.step(x, kept.call, owner.__dict__["scale"], ctx, state)


class Kept:
    """The call of a sublayer, as long as its modules, their weights and where these lie stay, and nobody has a hook.

    `holds` is asked once a token of each sublayer, and weights that stream by leave nothing in the caches: what it
    costs is the number of objects it touches.
    """

    __slots__ = ("_addresses", "_dtype", "_handles", "_hooks", "_places", "_tensors", "call", "step")

    def __init__(self, owner: nn.Module, x: Tensor) -> None:
        self._dtype = x.dtype
        modules = list(owner.modules())
        self._places = [
            (where, name, what)
            for m in modules
            for where in (m._modules, m._parameters, m._buffers)
            for name, what in where.items()
        ]
        self._tensors = [what for _, _, what in self._places if isinstance(what, Tensor)]
        self._addresses = [t.data_ptr() for t in self._tensors]
        self._hooks = [hooks for m in modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._handles = -1 if any(self._hooks) else RemovableHandle.next_id  # of all hooks that there ever were
        fn, norm = owner._modules["fn"], owner._modules["norm"]
        self.call: step.Call | None = None
        self.step: Callable[..., Tensor | None] | None = getattr(fn, "step", None)
        make: Callable[..., step.Call | None] | None = getattr(fn, "step_call", None)
        if make is not None and norm is not None and self._handles >= 0:
            normed = rms_norm(x, norm)
            self.call = None if normed is None else make(x, normed)

    def holds(self, dtype: torch.dtype) -> bool:
        if dtype != self._dtype or self._handles < 0:
            return False
        if self._handles != RemovableHandle.next_id:
            if any(self._hooks):
                return False
            self._handles = RemovableHandle.next_id
        for where, name, what in self._places:
            if where.get(name) is not what:
                return False
        return [t.data_ptr() for t in self._tensors] == self._addresses


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
    """A linear map as the kernel takes it, else None."""
    if type(module) is Linear:
        return _plain(x, module)
    return _coded(x, module) if type(module) is CodedLinear else None


def _plain(x: Tensor, module: Linear) -> step.Map | None:
    w, kind = module.weight, cpu.kind(x.dtype)
    if w.dtype != x.dtype or w.stride(1) != 1 or type(w) not in PLAIN or kind is None or not _fits(x, module.bias):
        return None
    return step.Map(kind, (w.data_ptr(), 0, _at(module.bias), 0, w.shape[0], w.stride(0)), w.shape[1], w.nbytes)


def _coded(x: Tensor, module: CodedLinear) -> step.Map | None:
    codes, kind = module.codes, coded_kind(module.bits, x.dtype, module.round_x)
    if kind is None or not codes.is_cpu or not _fits(x, module.bias):
        return None
    fields = codes.data_ptr(), module.side.data_ptr(), _at(module.bias), 0, module.rows, 0
    return step.Map(kind, fields, module.width, codes.numel())


def _fits(x: Tensor, bias: Tensor | None) -> bool:
    return bias is None or (bias.dtype == x.dtype and bias.stride(0) == 1)


def _at(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.data_ptr()

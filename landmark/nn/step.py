"""Residual sublayers of few tokens that are one call of a kernel, as many as follow each other, and what their modules
have to be for that.

A sublayer that can be steps of such a call has a method `as_steps(x)`, and so has its function f, `as_terms(x, frame)`
for what the kernel takes, a step for each of the functions that f is the sum of; None where modules are others than the
kernel knows. If f has a state, there is also
`step_seen(x, ctx, state)`: what its queries see this time, or None where it has to be computed module by module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from ..ctx import Ctx
from ..ops import step
from ..ops.linear import cpu
from ..ops.quant.codes import kind as coded_kind
from .codes import CodedLinear
from .linear import Linear, unhooked
from .norm import LayerNorm, RMSNorm

PLAIN = (Tensor, Parameter)


def through(layers: nn.ModuleList, x: Tensor, ctx: Ctx, states: Sequence[Any]) -> Tensor | None:
    """x after all layers; None if none of their sublayers can be a step. Of a layer that is a module dict, each of its
    values is called with its part of the state, and otherwise the layer."""
    plan = _plan(layers, x, ctx)
    if plan is None:
        return None
    steps, first, n = bytearray(plan.packed), 0, 0
    for part in plan.parts:
        state = states[part.layer] if part.name is None else states[part.layer][part.name]
        last, n = n, n + len(part.steps)
        if part.steps and _look(part, steps, last, x, ctx, state):
            continue
        if last > first:
            x = step.run(x, steps, first, last - first)
        x, first = part.module(x, ctx, state), n
    return step.run(x, steps, first, n - first) if n > first else x


def alone(sublayer: nn.Module, x: Tensor, ctx: Ctx, state: Any) -> Tensor | None:
    """A sublayer of x in a call of its own, or None."""
    plan = _plan(sublayer, x, ctx)
    if plan is None:
        return None
    steps, (part,) = bytearray(plan.packed), plan.parts
    return step.run(x, steps, 0, len(part.steps)) if _look(part, steps, 0, x, ctx, state) else None


def _look(part: Part, steps: bytearray, first: int, x: Tensor, ctx: Ctx, state: Any) -> bool:
    """Whether all steps of a part, the first of which has this number, can be told what they see."""
    for n, each in enumerate(part.steps, first):
        if each.seen is not None:
            found = each.seen(x, ctx, state if each.name is None else state[each.name])
            if found is None:
                return False
            step.look(steps, n, found)
    return True


def _plan(owner: nn.Module, x: Tensor, ctx: Ctx) -> Plan | None:
    """None if nothing of it is a step."""
    if owner.training or not few(x, ctx):
        return None
    kept: Kept | None = owner.__dict__.get("_kept")
    if kept is None or not kept.holds(x):
        kept = owner.__dict__["_kept"] = Kept(owner, x)
    plan = kept.plan
    return plan if plan.packed else None


class Step(NamedTuple):
    """What the kernel takes, and what tells it what it sees; `name`: where in its sublayer's state its own is."""

    packed: bytes
    seen: Callable[..., tuple[int, ...] | None] | None
    name: str | None


class Part(NamedTuple):
    """A module that is called as f(x, ctx, state), and where in the states its own is; its steps, if it can be some."""

    module: nn.Module
    layer: int
    name: str | None = None
    steps: Sequence[Step] = ()


class Plan(NamedTuple):
    """Parts in their order, and all their steps one after the other."""

    parts: Sequence[Part]
    packed: bytes


def of(
    x: Tensor, fn: nn.Module, before: nn.Module | None, after: nn.Module | None = None, *, scale: float = 1.0,
    aside: bool = False, name: str | None = None,
) -> list[Step] | None:  # fmt: skip
    """x + scale after(fn(before(x))) as steps, or None; see landmark.ops.step.Frame."""
    norms = [step.Norm() if m is None else norm(x, m) for m in (before, after)]
    make = getattr(fn, "as_terms", None)
    if make is None or norms[0] is None or norms[1] is None:
        return None
    terms = make(x, step.Frame(norms[0], norms[1], scale, aside))
    return None if terms is None else [Step(packed, getattr(fn, "step_seen", None), name) for packed in terms]


class Kept:
    """What of an owner's parts are steps, as long as its modules, their weights and where these lie stay.

    `holds` is asked once a token, and weights that stream by leave nothing in the caches: what it costs is the number
    of objects it touches. A part somebody has a hook in is no step; a layer somebody has a hook on stays whole.
    """

    __slots__ = (
        "_addresses", "_dtype", "_handles", "_hooked", "_names", "_owner", "_tensors", "_whats", "_wheres", "plan",
    )  # fmt: skip

    def __init__(self, owner: nn.Module, x: Tensor) -> None:
        self._owner, self._dtype = owner, x.dtype
        modules = list(owner.modules())
        places = [
            (where, name, what)
            for m in modules
            for where in (m._modules, m._parameters, m._buffers)
            for name, what in where.items()
        ]
        scaled = [m.__dict__ for m in modules if "scale" in m.__dict__]
        places += [(where, name, where[name]) for where in scaled for name in ("scale", "training")]
        places += [(m.__dict__, "forward", m.__dict__.get("forward")) for m in modules]
        self._wheres, self._names, self._whats = (list(column) for column in zip(*places, strict=True))
        self._tensors = [what for what in self._whats if isinstance(what, Tensor)]
        self._addresses = [t.data_ptr() for t in self._tensors]
        self.plan = self._planned(x)

    def _planned(self, x: Tensor) -> Plan:
        """Parts and their steps, as far as nobody looks on."""
        owner, parts = self._owner, list[Part]()
        self._hooked, self._handles = False, RemovableHandle.next_id  # of all hooks that there ever were
        if isinstance(owner, nn.ModuleList):
            for i, layer in enumerate(owner):
                if isinstance(layer, nn.ModuleDict) and not self._watched([layer]):
                    parts += [self._part(module, list(module.modules()), x, i, name) for name, module in layer.items()]
                else:
                    parts.append(Part(layer, i))
        else:
            parts.append(self._part(owner, list(owner.modules())[1:], x, 0))
        return Plan(parts, b"".join(each.packed for part in parts for each in part.steps))

    def _watched(self, modules: Sequence[nn.Module]) -> bool:
        watched = not unhooked(*modules)
        self._hooked = self._hooked or watched
        return watched

    def _part(
        self, module: nn.Module, inside: Sequence[nn.Module], x: Tensor, layer: int, name: str | None = None
    ) -> Part:
        make = getattr(module, "as_steps", None)
        made = None if make is None or module.training or self._watched(inside) else make(x)
        return Part(module, layer, name, made or ())

    def holds(self, x: Tensor) -> bool:
        if x.dtype != self._dtype:
            return False
        if not all(map(is_, map(dict.get, self._wheres, self._names), self._whats)):
            return False
        if list(map(Tensor.data_ptr, self._tensors)) != self._addresses:
            return False
        if self._hooked or self._handles != RemovableHandle.next_id:
            self.plan = self._planned(x)
        return True

    def __reduce__(self) -> Any:
        return _nothing, ()  # a copy of its owner finds its own


def _nothing() -> None:
    return None


def few(x: Tensor, ctx: Ctx) -> bool:
    """Whether x, of a pass that goes on from a state, has so few tokens that the kernel can run."""
    return ctx.memo(("step", x.dtype, x.shape), lambda: ctx.past is not None and step.why_not(x) is None)


def norm(x: Tensor, module: nn.Module) -> step.Norm | None:
    """A norm as the kernel takes it, else None."""
    if not isinstance(module, RMSNorm | LayerNorm) or module.groups != 1 or not unhooked(module):
        return None
    if isinstance(module, RMSNorm):
        bias, made = None, step.Norm(module.weight.data_ptr(), 0, False, module.eps, module.offset)
    else:
        bias, made = module.bias, step.Norm(module.weight.data_ptr(), _at(module.bias), True, module.eps)
    fits = (w.dtype == x.dtype and type(w) in PLAIN for w in (module.weight, bias) if w is not None)
    return made if all(fits) else None


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

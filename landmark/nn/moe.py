"""Sparse mixture of experts (Shazeer et al. 2017): many feed-forward functions, of which a token passes a few.

    MoE.Config(experts=8, active=2, hidden=14336, router=SoftmaxTopK.Config())             Mixtral
    MoE.Config(experts=64, active=6, hidden=1408, router=..., shared=GLU.Config(hidden=2816))   DeepSeekMoE

All experts' matrices are one stack [experts, out, in]; rows are sorted by expert and multiplied in one product, so that
the cost follows the active parameters. Which experts a token passes is the router's business (nn/router.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModuleConfig
from ..ctx import Ctx
from ..ops.activation import Activation, activation
from ..ops.fused import activate, glu
from ..ops.linear import cpu
from ..ops.moe import Plan, choose, combine, spread
from ..ops.moe import experts as few
from ..ops.step import Frame
from ..ops.step import experts as mixture
from . import step
from .codes import CodedExperts
from .linear import GroupedLinear, bare, count, unhooked
from .router import Router, RouterConfig, Routing


class Experts(nn.Module):
    """Feed-forward functions side by side, without biases: gated (`GLU`) or, without `gate`, plain perceptrons."""

    def __init__(self, number: int, dim: int, hidden: int, act: Activation, gated: bool) -> None:
        super().__init__()
        activation(act)
        self.act = act
        self.gate = GroupedLinear(number, dim, hidden) if gated else None
        self.up, self.down = GroupedLinear(number, dim, hidden), GroupedLinear(number, hidden, dim)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [M, dim], sorted by expert, counts [experts] -> [M, dim]."""
        up = self.up(x, counts)
        hidden = activate(up, self.act) if self.gate is None else glu(self.gate(x, counts), up, self.act)
        out: Tensor = self.down(hidden, counts)
        return out

    def of_few(self, x: Tensor, to: Routing) -> Tensor | None:
        """A few tokens x [N, dim] through the experts of `to`, all in one call; None where that is not to be had."""
        if not unhooked(self.gate, self.up, self.down) or (stacks := self.stacks(x)) is None:
            return None
        if (kind := self.kind(x)) is None or few.why_not(x, stacks) is not None:
            return None
        *inner, down = stacks
        return few.feed_forward(x, kind, inner, down, self.act, to.experts, to.weights, to.on_input)

    def stacks(self, x: Tensor) -> list[few.Stack] | None:
        """All matrices as a kernel for x's type takes them; None where they are of several kinds."""
        maps: list[nn.Module] = [m for m in (self.gate, self.up, self.down) if m is not None]
        if all(type(m) is CodedExperts for m in maps):
            return [m.stack for m in maps if type(m) is CodedExperts]
        plain = [m.weight for m in maps if type(m) is GroupedLinear]
        fit = all(type(w) in step.PLAIN and w.dtype == x.dtype and w.is_contiguous() for w in plain)
        return [few.Stack(w, None, *w.shape[1:]) for w in plain] if fit and len(plain) == len(maps) else None

    def kind(self, x: Tensor) -> int | None:
        """The kernel for x's type of their products."""
        return self.up.kind(x.dtype) if isinstance(self.up, CodedExperts) else cpu.kind(x.dtype)


class MoE(nn.Module):
    """sum_e weight_e expert_e(x) over a token's `active` experts e, plus shared(x) (DeepSeekMoE, Dai et al. 2024).

    `gated`: experts are GLUs, not plain perceptrons. `shared` is a feed-forward function that every token passes.
    Tokens outside of all sequences pass no expert.
    """

    class Config(ModuleConfig):
        experts: int
        active: int
        hidden: int
        router: RouterConfig
        act: Activation = "silu"
        gated: bool = True
        shared: ModuleConfig | None = None

        def check(self) -> None:
            super().check()
            if self.active > self.experts:
                raise ValueError(f"MoE.active is {self.active}, but there are {self.experts} experts; choose fewer")
            self.router.check_experts(self.experts, self.active)

        def build(self, dim: int) -> MoE:
            return MoE(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg = c = cfg
        self.router: Router = c.router.build(dim, c.experts, c.active)
        self.experts = Experts(c.experts, dim, c.hidden, c.act, c.gated)
        self.shared = c.shared.build(dim) if c.shared else None

    def active_parameters(self) -> int:
        """How many parameters a token passes."""
        every, routed = count(self), count(self.experts)
        return every - routed + routed // self.cfg.experts * self.cfg.active

    def forward(self, x: Tensor, ctx: Ctx | None = None, state: Any = None) -> Tensor:
        rows, inside = x.reshape(-1, x.shape[-1]), _inside(ctx)
        if inside is None:
            y = self.routed(rows, ctx)
        else:
            y = torch.zeros_like(rows).index_copy(0, inside, self.routed(rows[inside], ctx))
        y = y.view_as(x)
        return y if self.shared is None else y + self.shared(x, ctx)

    def as_terms(self, x: Tensor, frame: Frame) -> list[bytes] | None:
        """As landmark.nn.step has it."""
        rule, stacks, kind = self.router.rule(), self.experts.stacks(x), self.experts.kind(x)
        if rule is None or stacks is None or kind is None or not bare(rule[0]) or (self.shared and frame.after.weight):
            return None
        weight, active, each = rule[0].weight, self.cfg.active, sum(s.bytes for s in stacks)
        if choose.why_not(x.flatten(0, 1), weight) is not None or few.SOURCE.why_not() is not None:
            return None
        choice, (*inner, down) = choose.packed(weight, active, rule[1]), stacks
        doing = few.packed(kind, inner, down, active, self.experts.act, self.router.on_input)
        routed = [mixture(frame, choice, doing, active * each, x.dtype)]
        if self.shared is None:
            return routed
        make = getattr(self.shared, "as_terms", None)
        shared = None if make is None else make(x, frame._replace(aside=True))
        return None if shared is None else routed + shared

    def routed(self, x: Tensor, ctx: Ctx | None) -> Tensor:
        """Tokens x [N, dim] (those of `ctx` that are in a sequence) through their experts."""
        to = self.router(x, ctx)
        if (y := self.experts.of_few(x, to)) is not None:
            return y
        plan = Plan.of(to.experts, self.cfg.experts, dropping=to.dropping)
        rows, weights = spread(x, plan), to.weights
        if to.on_input:
            rows = rows * combine_weights(weights, plan).to(rows.dtype)
            weights = torch.ones_like(weights)
        return combine(self.experts(rows, plan.counts), weights, plan)


def combine_weights(weights: Tensor, plan: Plan) -> Tensor:
    """weights [N, k] -> [M, 1], in the order of the rows."""
    kept = plan.places.flatten()
    if plan.tokens.numel() != kept.numel():
        weights, kept = weights.flatten()[kept >= 0], kept[kept >= 0]
    return torch.empty_like(weights.flatten()).scatter(0, kept, weights.flatten())[:, None]


def _inside(ctx: Ctx | None) -> Tensor | None:
    """Which tokens lie in a sequence; None if all do."""
    if ctx is None or ctx.bounds.spans is None:
        return None
    bounds, device = ctx.bounds, ctx.positions.device
    if sum(length for _, length in bounds.sequences) == bounds.rows * bounds.width:
        return None
    return ctx.memo("inside", lambda: (bounds.index(device).flatten() >= 0).nonzero().flatten())

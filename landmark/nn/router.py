"""Routers: which experts a token passes, and how much each of them counts. A second way to choose is a second class.

Every router is a linear map to one logit an expert and a rule. What it says of a training pass goes to `ctx.reports`:
losses that keep the load even, and the figures `router_load` (tokens of the busiest expert / mean), `router_entropy`
(nats, of a token's scores as a distribution) and `router_dropped` (share of the choices). Batches are routed without
limit unless the class has a capacity, which acts in training only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..ctx import Ctx
from ..ops.moe import choose
from .float32 import Float32Buffers
from .linear import Linear, bare


@dataclass(frozen=True)
class Routing:
    """What a router decides for N tokens."""

    experts: Tensor  # [N, active]: best first; -1 for a choice that is dropped
    weights: Tensor  # [N, active], float32
    dropping: bool = False  # whether there may be dropped choices
    on_input: bool = False  # weights multiply the experts' inputs, not their outputs


class RouterConfig(Config, ABC, abstract=True):
    """`build` gets the widths from `MoE.Config`."""

    @abstractmethod
    def build(self, dim: int, experts: int, active: int) -> Router: ...

    def check_experts(self, experts: int, active: int) -> None:
        """Raise ValueError if it cannot choose `active` of `experts`."""

    def check_weights(self, *names: str) -> None:
        for name in names:
            if not 0.0 <= getattr(self, name) < 1e3:
                raise ValueError(f"{self.type_name}.{name} is {getattr(self, name)!r}; it must be 0 or more")


class Router(nn.Module, ABC):
    """Tokens [N, dim] -> `Routing`."""

    on_input = False  # as in Routing

    def __init__(self, experts: int, active: int) -> None:
        super().__init__()
        self.experts, self.active = experts, active

    @abstractmethod
    def forward(self, x: Tensor, ctx: Ctx | None) -> Routing: ...

    def listener(self, x: Tensor, ctx: Ctx | None) -> Ctx | None:
        """Who is to be told of this pass, if anyone is and there is anything to tell."""
        return ctx if self.training and len(x) else None

    def rule(self) -> tuple[Linear, choose.Rule] | None:
        """Its map and its rule as `choose` has them, which does all in one call and tells nobody; None if it cannot."""
        return None

    def direct(self, x: Tensor) -> Routing | None:
        """By `choose`, where that can choose for these tokens."""
        if self.training or (found := self.rule()) is None:
            return None
        linear, rule = found
        if not bare(linear) or choose.why_not(x, linear.weight) is not None:
            return None
        return Routing(*choose.choose(x, linear.weight, self.active, rule), on_input=self.on_input)

    def report_use(self, ctx: Ctx, counts: Tensor, scores: Tensor, dropped: Tensor | None = None) -> None:
        """Figures of a pass: counts [E] of the choices, scores [N, E]."""
        with torch.no_grad():
            p = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
            load = counts.max() / counts.float().mean().clamp_min(1e-20)
            ctx.reports.metric("router_load", load, 1)
            ctx.reports.metric("router_entropy", -torch.xlogy(p, p).sum(), len(p))
            if dropped is not None:
                ctx.reports.metric("router_dropped", dropped.sum(), dropped.numel())


def count_choices(experts: Tensor, number: int) -> Tensor:
    """[E]: how often each expert is chosen in experts [...]."""
    chosen = experts.flatten()
    return torch.zeros(number, dtype=torch.long, device=chosen.device).scatter_add_(0, chosen, torch.ones_like(chosen))


def balance(counts: Tensor, scores: Tensor, choices: int) -> Tensor:
    """sum_i f_i P_i with f_i = E / choices * counts_i and P_i the mean score of expert i: 1 for an even load.

    Switch (Fedus et al. 2021, eq. 4), DeepSeekMoE (Dai et al. 2024, eq. 12). Its gradient flows through P alone.
    """
    share = counts * (counts.numel() / max(choices, 1))
    return (share.to(scores.dtype) * scores.mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean of log(sum exp(logits))^2 (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return logits.logsumexp(-1).square().mean()


class SoftmaxTopK(Router):
    """The `active` largest of softmax(W x): Mixtral, Qwen3-MoE, DeepSeekMoE, DeepSeek-V2.

    `renormalise`: the chosen weights sum to 1 (Mixtral; the softmax over the chosen logits). `scale` multiplies them
    (DeepSeek-V2's routed_scaling_factor). With `groups` > 1, only experts of the `active_groups` groups that hold the
    largest scores can be chosen (DeepSeek-V2, 2024, sec. 2.2.2: a group is a device).

    Losses: `balance` weighs that of experts (1 for an even load; transformers' is `active` times as large and mixes the
    layers), `group_balance` that of groups (DeepSeekMoE, 2024, eq. 15-17), `communication` that of the tokens
    sent to each group (DeepSeek-V2, eq. 29-31), `z` the router z-loss. Groups limit nothing where all are active.
    """

    class Config(RouterConfig):
        renormalise: bool = True
        scale: float = 1.0
        groups: int = 1
        active_groups: int = 1
        balance: float = 0.0
        group_balance: float = 0.0
        communication: float = 0.0
        z: float = 0.0

        def check(self) -> None:
            super().check()
            self.check_weights("balance", "group_balance", "communication", "z")
            check_groups(self)

        def check_experts(self, experts: int, active: int) -> None:
            check_grouping(self, experts, active)

        def build(self, dim: int, experts: int, active: int) -> SoftmaxTopK:
            return SoftmaxTopK(self, dim, experts, active)

    def __init__(self, cfg: Config, dim: int, experts: int, active: int) -> None:
        super().__init__(experts, active)
        self.cfg, self.linear = cfg, Linear(dim, experts, bias=False)

    def forward(self, x: Tensor, ctx: Ctx | None) -> Routing:
        c = self.cfg
        if (direct := self.direct(x)) is not None:
            return direct
        logits = self.linear(x)
        scores = torch.softmax(logits, -1, dtype=torch.promote_types(x.dtype, torch.float32))
        allowed = scores
        if c.active_groups < c.groups:
            best = scores.unflatten(-1, (c.groups, -1)).amax(-1)
            allowed = scores.masked_fill(~in_best_groups(best, c.active_groups, self.experts), -1.0)
        weights, experts = allowed.topk(self.active, -1)
        if c.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        if (told := self.listener(x, ctx)) is not None:
            counts = count_choices(experts, self.experts)
            self.report_use(told, counts, scores.detach())
            if c.balance:
                told.reports.loss("router_balance", balance(counts, scores, experts.numel()), c.balance)
            if c.group_balance:
                told.reports.loss("router_group_balance", self.even_groups(counts, scores), c.group_balance)
            if c.communication:
                told.reports.loss("router_communication", self.even_sending(experts, scores), c.communication)
            if c.z:
                told.reports.loss("router_z", z_loss(logits.to(scores.dtype)), c.z)
        return Routing(experts, weights if c.scale == 1.0 else weights * c.scale)

    def rule(self) -> tuple[Linear, choose.Rule]:
        c = self.cfg
        rule = choose.Rule("softmax", None, c.groups, c.active_groups, renormalise=c.renormalise, scale=c.scale)
        return self.linear, rule

    def even_groups(self, counts: Tensor, scores: Tensor) -> Tensor:
        """sum_i f'_i P'_i over groups: f' the mean of f in a group, P' the sum of P (Dai et al. 2024, eq. 15-17)."""
        choices = scores.shape[0] * self.active
        share = counts.unflatten(0, (self.cfg.groups, -1)).float().mean(-1) * (self.experts / max(choices, 1))
        return (share * scores.mean(0).unflatten(0, (self.cfg.groups, -1)).sum(-1)).sum()

    def even_sending(self, experts: Tensor, scores: Tensor) -> Tensor:
        """sum_i f''_i P''_i over groups: f'' = groups / active_groups times the share of tokens that are sent to the
        group, P'' the sum of P (DeepSeek-V2, 2024, eq. 29-31)."""
        groups, size = self.cfg.groups, self.experts // self.cfg.groups
        sent = torch.zeros(len(experts), groups, dtype=scores.dtype, device=scores.device)
        share = sent.scatter_(-1, experts // size, 1.0).mean(0) * (groups / self.cfg.active_groups)
        return (share * scores.mean(0).unflatten(0, (groups, -1)).sum(-1)).sum()


def check_groups(cfg: Any) -> None:
    if cfg.active_groups > cfg.groups:
        raise ValueError(f"{cfg.type_name}.active_groups is {cfg.active_groups}, but there are {cfg.groups} groups")


def check_grouping(cfg: Any, experts: int, active: int, least: int = 1) -> None:
    if experts % cfg.groups or experts // cfg.groups < least:
        needed = "" if least == 1 else f" of at least {least}"
        raise ValueError(f"{cfg.type_name}.groups is {cfg.groups}: {experts} experts have no such equal groups{needed}")
    if active > (able := experts // cfg.groups * cfg.active_groups):
        raise ValueError(
            f"MoE.active is {active}, but {cfg.type_name}.active_groups = {cfg.active_groups} leave only {able} experts"
        )


def in_best_groups(best: Tensor, count: int, experts: int) -> Tensor:
    """[N, E]: whether an expert is in one of the `count` groups with the largest `best` [N, groups]."""
    chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(count, -1).indices, True)
    return chosen.repeat_interleave(experts // best.shape[-1], -1)


class SigmoidTopK(Float32Buffers, Router):
    """DeepSeek-V3 (2024, sec. 2.1.2): sigmoid scores, and a bias an expert that steers the choice alone.

    A group's score is the sum of its two largest biased scores; only experts of the `active_groups` best groups can be
    chosen, by their biased scores. Weights are the unbiased ones, made to sum to 1 if `renormalise`, times `scale`.

    In training, the choices are counted, and `adjust`, called after every update of the weights, moves the bias by
    `bias_rate` towards an even load. `balance` weighs the sequence-wise loss (eq. 17-20), averaged over the tokens of
    the batch.
    """

    class Config(RouterConfig):
        renormalise: bool = True
        scale: float = 1.0
        groups: int = 1
        active_groups: int = 1
        bias_rate: float = 1e-3
        balance: float = 1e-4

        def check(self) -> None:
            super().check()
            self.check_weights("bias_rate", "balance")
            check_groups(self)

        def check_experts(self, experts: int, active: int) -> None:
            check_grouping(self, experts, active, least=2 if self.groups > 1 else 1)

        def build(self, dim: int, experts: int, active: int) -> SigmoidTopK:
            return SigmoidTopK(self, dim, experts, active)

    bias: Tensor

    def __init__(self, cfg: Config, dim: int, experts: int, active: int) -> None:
        super().__init__(experts, active)
        self.cfg, self.linear = cfg, Linear(dim, experts, bias=False)
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))
        self.load: Tensor | None = None  # choices since the last `adjust`

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, ctx: Ctx | None) -> Routing:
        c = self.cfg
        if (direct := self.direct(x)) is not None:
            return direct
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = torch.nn.functional.linear(x.to(wide), self.linear.weight.to(wide)).sigmoid()
        biased = scores.detach() + self.bias
        if c.active_groups < c.groups:
            best = biased.unflatten(-1, (c.groups, -1)).topk(2, -1).values.sum(-1)
            biased = biased.masked_fill(~in_best_groups(best, c.active_groups, self.experts), -torch.inf)
        experts = biased.topk(self.active, -1).indices
        weights = scores.gather(-1, experts)
        if c.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            counts = count_choices(experts, self.experts)
            if not recomputing():
                self.load = counts if self.load is None else self.load + counts
            if (told := self.listener(x, ctx)) is not None:
                self.report_use(told, counts, scores.detach())
                if c.balance:
                    told.reports.loss("router_balance", sequence_balance(experts, scores, told), c.balance)
        return Routing(experts, weights * c.scale)

    def rule(self) -> tuple[Linear, choose.Rule]:
        c = self.cfg
        return self.linear, choose.Rule(
            "sigmoid", self.bias, c.groups, c.active_groups, best=2, renormalise=c.renormalise, scale=c.scale,
            rounded=False, least=1e-20,
        )  # fmt: skip

    @torch.no_grad()
    def adjust(self, total: Callable[[Sequence[float]], list[float]]) -> None:
        """After an update: bias += bias_rate * sign(mean load - load); `total` adds up over all processes."""
        mine = [0.0] * self.experts if self.load is None else self.load.tolist()
        load = torch.tensor(total(mine), dtype=torch.float64)
        self.bias += self.cfg.bias_rate * (load.mean() - load).sign().to(self.bias)
        self.load = None


def recomputing() -> bool:
    """Whether this is a second forward pass, within backward (activation checkpointing)."""
    return torch._C._current_graph_task_id() != -1


def sequence_balance(experts: Tensor, scores: Tensor, ctx: Ctx) -> Tensor:
    """sum_i f_i P_i of each token's sequence (DeepSeek-V3, eq. 17-20), averaged over tokens; 1 for an even load.

    f_i: E / active times the share of a sequence's tokens that chose expert i. P_i: their mean score, where a token's
    scores are made to sum to 1.
    """
    number, many = scores.shape[1], len(ctx.bounds.sequences)
    index = ctx.bounds.index(scores.device).flatten()
    index = index[index >= 0]
    sizes = scores.new_tensor([length for _, length in ctx.bounds.sequences])
    flat = (index[:, None] * number + experts).flatten()
    chosen = count_choices(flat, many * number).view(many, number) * (number / experts.shape[1])
    shares = scores / scores.sum(-1, keepdim=True)
    means = scores.new_zeros(many, number).index_add(0, index, shares) / sizes.clamp_min(1)[:, None]
    return (chosen.to(scores.dtype) * means).sum() / max(len(index), 1)


class SigmoidInput(Router):
    """Llama 4 (Meta 2025): the experts of the largest logits; the sigmoid of the logit multiplies the expert's input.

    `balance` weighs the Switch loss on the softmax of the logits.
    """

    on_input = True

    class Config(RouterConfig):
        balance: float = 0.0

        def check(self) -> None:
            super().check()
            self.check_weights("balance")

        def build(self, dim: int, experts: int, active: int) -> SigmoidInput:
            return SigmoidInput(self, dim, experts, active)

    def __init__(self, cfg: Config, dim: int, experts: int, active: int) -> None:
        super().__init__(experts, active)
        self.cfg, self.linear = cfg, Linear(dim, experts, bias=False)

    def forward(self, x: Tensor, ctx: Ctx | None) -> Routing:
        if (direct := self.direct(x)) is not None:
            return direct
        logits = self.linear(x)
        best, experts = logits.topk(self.active, -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        if (told := self.listener(x, ctx)) is not None:
            counts, scores = count_choices(experts, self.experts), logits.softmax(-1, dtype=wide)
            self.report_use(told, counts, scores.detach())
            if self.cfg.balance:
                told.reports.loss("router_balance", balance(counts, scores, experts.numel()), self.cfg.balance)
        return Routing(experts, best.to(wide).sigmoid(), on_input=self.on_input)

    def rule(self) -> tuple[Linear, choose.Rule]:
        return self.linear, choose.Rule("logit")

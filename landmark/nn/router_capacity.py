"""The first routers: noise (Shazeer et al. 2017), two experts of limited capacity (GShard, GLaM), one (Switch)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ctx import Ctx
from ..ops.linear import linear
from .linear import Linear
from .router import Router, RouterConfig, Routing, balance, count_choices, z_loss


class NoisyTopK(Router):
    """Noisy top-k gating (Shazeer et al. 2017, sec. 2.1): softmax over the `active` largest of W x + noise.

    In training the logits get standard normal noise times softplus(W_noise x) (eq. 4), and two losses keep experts in
    use: `importance` weighs CV(sum of weights)^2 (eq. 6, 7), `load` CV(smooth count of tokens)^2 (eq. 8-11). Both
    matrices start as zeros (appendix A). In evaluation there is no noise.
    """

    class Config(RouterConfig):
        importance: float = 0.1
        load: float = 0.1

        def check(self) -> None:
            super().check()
            self.check_weights("importance", "load")

        def build(self, dim: int, experts: int, active: int) -> NoisyTopK:
            return NoisyTopK(self, dim, experts, active)

    def __init__(self, cfg: Config, dim: int, experts: int, active: int) -> None:
        super().__init__(experts, active)
        self.cfg = cfg
        self.weight = nn.Parameter(torch.zeros(experts, dim))
        self.noise_weight = nn.Parameter(torch.zeros(experts, dim))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.noise_weight)

    def forward(self, x: Tensor, ctx: Ctx | None) -> Routing:
        wide = torch.promote_types(x.dtype, torch.float32)
        clean = linear(x, self.weight).to(wide)
        if not self.training:
            best, experts = clean.topk(self.active, -1)
            return Routing(experts, best.softmax(-1))
        spread = nn.functional.softplus(linear(x, self.noise_weight).to(wide))
        noisy = clean + torch.randn_like(clean) * spread
        best, experts = noisy.topk(min(self.active + 1, self.experts), -1)
        chosen = experts[:, : self.active]
        weights = best[:, : self.active].softmax(-1)
        if (told := self.listener(x, ctx)) is not None:
            gates = torch.zeros_like(clean).scatter(-1, chosen, weights)
            counts = count_choices(chosen, self.experts)
            self.report_use(told, counts, gates.detach())
            if self.cfg.importance:
                told.reports.loss("router_importance", squared_cv(gates.sum(0)), self.cfg.importance)
            if self.cfg.load:
                told.reports.loss(
                    "router_noisy_load", squared_cv(self.smooth_load(clean, spread, best, chosen)), self.cfg.load
                )
        return Routing(chosen, weights)

    def smooth_load(self, clean: Tensor, spread: Tensor, best: Tensor, chosen: Tensor) -> Tensor:
        """[E]: the expected number of tokens, were each expert's noise drawn again (eq. 8-10).

        An expert would be chosen if it beat the k-th largest of the others: the (k+1)-th of all for one that is chosen,
        the k-th for one that is not.
        """
        if self.active == self.experts:
            return clean.new_full((self.experts,), float(len(clean)))
        is_chosen = torch.zeros_like(clean, dtype=torch.bool).scatter_(-1, chosen, True)
        threshold = torch.where(is_chosen, best[:, self.active, None], best[:, self.active - 1, None])
        return torch.special.ndtr((clean - threshold) / spread).sum(0)


def squared_cv(x: Tensor) -> Tensor:
    """The square of the coefficient of variation, variance / mean^2 (Shazeer et al. 2017, eq. 7)."""
    return x.var(unbiased=False) / (x.mean().square() + 1e-10)


class Capacity(RouterConfig, abstract=True):
    """In training, an expert takes at most ceil(capacity_factor * active * tokens / experts) tokens of a batch.

    First choices come before second ones, then earlier tokens before later ones; what exceeds the capacity is dropped
    and passes by on the residual stream. In evaluation nothing is dropped. `balance` weighs E sum_i f_i P_i with f_i
    the share of tokens whose first choice is expert i and P_i its mean softmax (Fedus et al. 2021, eq. 4; GShard writes
    it divided by E^2), `z` the router z-loss.
    """

    capacity_factor: float = 1.25
    balance: float = 0.01
    z: float = 0.0

    def check(self) -> None:
        super().check()
        self.check_weights("balance", "z")
        if not 0.0 < self.capacity_factor < math.inf:
            raise ValueError(f"{self.type_name}.capacity_factor is {self.capacity_factor!r}; it must be above 0")

    def need_active(self, active: int, wanted: int) -> None:
        if active != wanted:
            raise ValueError(f"MoE.active is {active}, but {self.type_name} chooses {wanted}; set active = {wanted}")


class CapacityRouter(Router):
    """What routers with a capacity share."""

    cfg: Capacity

    def limit(self, experts: Tensor, weights: Tensor, kept: Tensor | None = None) -> Routing:
        """Choices [N, k] beyond an expert's capacity, or not `kept`, become -1, but take up their place."""
        capacity = math.ceil(self.cfg.capacity_factor * experts.numel() / self.experts)
        fits = ranks(experts, self.experts) < capacity
        kept = fits if kept is None else fits & kept
        return Routing(torch.where(kept, experts, -1), weights, dropping=True)

    def report(self, ctx: Ctx, logits: Tensor, scores: Tensor, first: Tensor, counts: Tensor, routing: Routing) -> None:
        self.report_use(ctx, counts, scores.detach(), routing.experts < 0)
        if self.cfg.balance:
            value = balance(count_choices(first, self.experts), scores, first.numel())
            ctx.reports.loss("router_balance", value, self.cfg.balance)
        if self.cfg.z:
            ctx.reports.loss("router_z", z_loss(logits), self.cfg.z)


def ranks(experts: Tensor, number: int) -> Tensor:
    """[N, k]: how many earlier choices went to the same expert; all first choices are earlier than any second one."""
    flat = experts.T.flatten()
    ordered, order = flat.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(number, device=flat.device))
    at = torch.arange(flat.numel(), device=flat.device) - starts[ordered]
    return torch.empty_like(at).scatter_(0, order, at).view(experts.shape[::-1]).T


class GShard(CapacityRouter):
    """Two experts a token (Lepikhin et al. 2020, algorithm 1; GLaM, Du et al. 2021): weights are softmax(W x), made to
    sum to 1 over the two.

    With `random_second`, in training the second expert is passed with probability min(1, 2 weight), as in GShard.
    """

    class Config(Capacity):
        random_second: bool = True

        def check_experts(self, experts: int, active: int) -> None:
            self.need_active(active, 2)

        def build(self, dim: int, experts: int, active: int) -> GShard:
            return GShard(self, dim, experts, active)

    cfg: Config

    def __init__(self, cfg: Config, dim: int, experts: int, active: int) -> None:
        super().__init__(experts, active)
        self.cfg, self.linear = cfg, Linear(dim, experts, bias=False)

    def forward(self, x: Tensor, ctx: Ctx | None) -> Routing:
        logits = self.linear(x).to(torch.promote_types(x.dtype, torch.float32))
        scores = logits.softmax(-1)
        best, experts = scores.topk(2, -1)
        weights = best / best.sum(-1, keepdim=True)
        if not self.training:
            return Routing(experts, weights)
        kept = None
        if self.cfg.random_second:
            kept = torch.ones_like(experts, dtype=torch.bool)
            kept[:, 1] = 2 * weights[:, 1].detach() > torch.rand(len(x), dtype=weights.dtype, device=x.device)
        routing = self.limit(experts, weights, kept)
        if (told := self.listener(x, ctx)) is not None:
            self.report(told, logits, scores, experts[:, 0], count_choices(experts, self.experts), routing)
        return routing


class Switch(CapacityRouter):
    """One expert a token, weighed by its softmax(W x) (Fedus et al. 2021, sec. 2).

    `jitter`: in training the router's input is multiplied by numbers drawn from [1 - jitter, 1 + jitter] (sec. 2.4).
    """

    class Config(Capacity):
        jitter: float = 0.01

        def check(self) -> None:
            super().check()
            if not 0.0 <= self.jitter < 1.0:
                raise ValueError(f"Switch.jitter is {self.jitter!r}; it must be in [0, 1)")

        def check_experts(self, experts: int, active: int) -> None:
            self.need_active(active, 1)

        def build(self, dim: int, experts: int, active: int) -> Switch:
            return Switch(self, dim, experts, active)

    cfg: Config

    def __init__(self, cfg: Config, dim: int, experts: int, active: int) -> None:
        super().__init__(experts, active)
        self.cfg, self.linear = cfg, Linear(dim, experts, bias=False)

    def forward(self, x: Tensor, ctx: Ctx | None) -> Routing:
        if self.training and self.cfg.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.cfg.jitter, 1 + self.cfg.jitter)
        logits = self.linear(x).to(torch.promote_types(x.dtype, torch.float32))
        scores = logits.softmax(-1)
        weights, experts = scores.max(-1, keepdim=True)
        if not self.training:
            return Routing(experts, weights)
        routing = self.limit(experts, weights)
        if (told := self.listener(x, ctx)) is not None:
            self.report(told, logits, scores, experts, count_choices(experts, self.experts), routing)
        return routing

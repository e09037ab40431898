"""RWKV-7 "Goose" (Peng et al. 2025, 2503.14456): a generalised delta rule, its state a matrix that each token edits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModuleConfig
from ..ctx import Ctx
from ..ops.delta import goose, with_bonus
from .cache import SlotState
from .rwkv5 import MatrixMixer
from .token_shift import LowRank, depth, fill, zigzag

SLOWEST = math.exp(-0.5)  # a channel decays by exp(-SLOWEST) a token at most: to 0.545
VALUES = "RWKV7 values"  # where the first layer tells the others its values


class RWKV7(MatrixMixer):
    """out(g * (norm(y) + bonus)), y_t = S_t r_t, with S_t = S_{t-1} (diag(w_t) - k^T (a_t k)) + v_t^T k'_t: w_t are
    decays, k the direction to remove and a_t how much of it, each of which depends on the token (eq. 4 to 21).

    `value_residual`: values are mixed with those of the model's first such layer (eq. 8). Ranks of the low-rank maps
    are by default the authors' for the width.
    """

    class Config(ModuleConfig):
        head_dim: int = 64
        decay_rank: int | None = None
        rate_rank: int | None = None
        value_rank: int | None = None
        gate_rank: int | None = None
        value_residual: bool = True

        def check(self) -> None:
            super().check()
            if self.value_rank is not None and not self.value_residual:
                raise ValueError("RWKV7.value_rank is given, but value_residual is False; give one of them only")

        def build(self, dim: int) -> RWKV7:
            return RWKV7(self, dim)

    rows = 6  # r, w, k, v, a, g

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__("RWKV7", cfg.head_dim, dim)
        self.decay = LowRank(dim, cfg.decay_rank or usual_rank(dim, 2.5), dim, act="tanh")
        self.rate = LowRank(dim, cfg.rate_rank or usual_rank(dim, 2.5), dim)
        self.gate = LowRank(dim, cfg.gate_rank or usual_rank(dim, 5), dim, act="sigmoid", bias=False)
        value_rank = cfg.value_rank or usual_rank(dim, 1.7)
        self.value = LowRank(dim, value_rank, dim) if cfg.value_residual else None
        self.remove = nn.Parameter(torch.empty(dim))
        self.replace = nn.Parameter(torch.empty(dim))

    @torch.no_grad()
    def reset_at(self, layer: int, layers: int) -> None:
        dim, device = self.dim, self.remove.device
        deep, shallow = depth(layer, layers)
        channel = torch.arange(dim, device=device) / max(1, dim - 1)
        linear, spread = channel - 0.5, zigzag(dim, self.head_dim, device)
        self.shift.start(*(power * shallow for power in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)))
        self.decay.start(-5.5 + 6 * channel ** (1 + deep**0.3) + 2.5 * spread)
        self.rate.start(-0.19 + 0.3 * spread + 0.4 * linear)
        self.gate.start()
        if self.value is not None:
            self.value.start(0.73 - 0.4 * linear)
        self.remove.copy_(0.71 - 0.1 * linear)
        self.replace.fill_(1.02)
        self.bonus.fill_(-0.04)
        self.norm.weight.fill_(((1 + layer) / layers) ** 0.7)
        for part, scale in ((self.r, 0.5), (self.k, 0.05), (self.v, 0.5)):
            nn.init.uniform_(part.weight, -scale * dim**-0.5, scale * dim**-0.5)
        fill(self.out, 0)

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token beyond the layer's own weights: a matrix is searched, edited twice, decayed and read."""
        return 9 * self.dim * self.head_dim

    def forward(self, x: Tensor, ctx: Ctx, state: SlotState | None = None) -> Tensor:
        r, w, k, v, a, g = self.shift(x, ctx, state)
        if state is not None and ctx.bounds.dense and ctx.bounds.width == 1:
            held = state.tensors["matrix"]
            if goose.why_not(self.head_dim, held, x, self.remove, self.bonus, self.norm.weight) is None:
                return self._step(r, w, k, v, a, g, ctx, state)
        rate, gate = self.rate(a).sigmoid(), self.gate(g)
        r, k, values = self.r(r), self.k(k), self.v(v)
        first = ctx.shared.setdefault(VALUES, values)
        if self.value is not None:
            values = torch.lerp(values, first, self.value(v).sigmoid())
        removed = F.normalize(self.by_head(k * self.remove), dim=-1)
        k = k * torch.lerp(torch.ones_like(rate), rate, self.replace)
        decay = self.decay(w)
        decay = -SLOWEST * decay.to(torch.promote_types(decay.dtype, torch.float32)).sigmoid()
        r, k, v, rate = (self.by_head(t) for t in (r, k, values, rate))
        y = self.mix(r, self.by_head(decay), k, v, ctx, state, a=-removed, b=removed * rate)
        y = with_bonus(self.by_head(self.norm(y.flatten(-2))), r, k, v, self.bonus)
        out: Tensor = self.out(y.flatten(-2) * gate)
        return out

    def _step(
        self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, g: Tensor, ctx: Ctx, state: SlotState
    ) -> Tensor:
        """`forward` of one token a sequence: what lies between the linear maps is one call."""
        values = self.v(v)
        first = ctx.shared.setdefault(VALUES, values)
        mix = None if self.value is None else self.value(v)
        assert self.norm.bias is not None
        y, state.tensors["matrix"] = goose.goose(
            self.r(r), self.k(k), values, self.rate(a), self.decay(w), self.gate(g), mix,
            None if mix is None else first, self.remove, self.replace, self.bonus, self.norm.weight, self.norm.bias,
            state.tensors["matrix"], slowest=SLOWEST, eps=self.norm.eps,
        )  # fmt: skip
        out: Tensor = self.out(y)
        return out


def usual_rank(dim: int, times: float) -> int:
    """The authors' rank of a low-rank map for a width: `times` its root, in multiples of 32."""
    return max(32, round(times * dim**0.5 / 32) * 32)

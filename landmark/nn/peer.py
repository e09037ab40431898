"""A million experts of one neuron each (PEER, He 2024, 2407.04153), retrieved by product keys."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import Config as PlainConfig
from ..config import ModuleConfig
from ..ctx import Ctx
from ..ops.activation import Activation, activation
from ..ops.peer import mix_experts, product_topk
from .float32 import Float32Buffers
from .linear import Linear
from .router import recomputing


class BatchNorm(Float32Buffers):
    """(x - mean) / sqrt(var + eps) * weight + bias over tokens (Ioffe & Szegedy 2015), in at least float32.

    In training, mean and variance are those of the batch's tokens that lie in a sequence; otherwise running averages of
    these, kept in float32, so that no token's result depends on another.
    """

    class Config(PlainConfig):
        eps: float = 1e-5
        momentum: float = 0.1

        def build(self, dim: int) -> BatchNorm:
            return BatchNorm(self, dim)

    mean: Tensor
    var: Tensor

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))

    def reset_parameters(self) -> None:
        for ones in (self.weight, self.var):
            nn.init.ones_(ones)
        for zeros in (self.bias, self.mean):
            nn.init.zeros_(zeros)

    def forward(self, x: Tensor, inside: Tensor | None = None) -> Tensor:
        """x [N, dim], `inside` [N] bool: which rows lie in a sequence (None: all)."""
        wide, mean, var = x.to(torch.promote_types(x.dtype, torch.float32)), self.mean, self.var
        if self.training:
            rows = wide if inside is None else wide[inside]
            if rows.shape[0] > 1:
                var, mean = torch.var_mean(rows, 0, correction=0)
                if not recomputing():
                    unbiased = var.detach() * (rows.shape[0] / (rows.shape[0] - 1))
                    self.mean.lerp_(mean.detach().to(self.mean.dtype), self.cfg.momentum)
                    self.var.lerp_(unbiased.to(self.var.dtype), self.cfg.momentum)
        scale = self.weight * torch.rsqrt(var.to(wide.dtype) + self.cfg.eps)
        return ((wide - mean) * scale + self.bias).to(x.dtype)


class PEER(nn.Module):
    """sum over heads h and their best experts i of g_hi act(u_i . x) v_i, with g_h the softmax (or the sigmoid) of the
    scores q_h(x) . key_i (eq. 1 to 7).

    A key is a pair of sub-keys out of two sets of sqrt(experts): the best are found in sqrt(experts) steps, exactly.
    Heads share the keys and the experts. `active`: how many experts each head retrieves. `query_norm`: on queries, over
    tokens (sec. 3.4), or None. The paper's largest: 1024^2 experts, 8 heads, 16 active.
    """

    class Config(ModuleConfig):
        experts: int = 1024 * 1024
        heads: int = 8
        active: int = 16
        key_dim: int = 128
        act: Activation = "gelu"
        score: Literal["softmax", "sigmoid"] = "softmax"
        query_norm: BatchNorm.Config | None = BatchNorm.Config()

        def check(self) -> None:
            super().check()
            activation(self.act)
            if math.isqrt(self.experts) ** 2 != self.experts:
                near = round(math.sqrt(self.experts)) ** 2
                raise ValueError(f"PEER.experts is {self.experts}, which is no square; choose {near}, for example")
            if self.active > self.experts:
                raise ValueError(f"PEER.active is {self.active}, but there are {self.experts} experts; choose fewer")
            if self.key_dim % 2:
                raise ValueError(f"PEER.key_dim is {self.key_dim}; a key has two halves, so choose an even width")
            if self.score not in ("softmax", "sigmoid"):
                raise ValueError(f"PEER.score is {self.score!r}; choose 'softmax' or 'sigmoid'")

        def build(self, dim: int) -> PEER:
            return PEER(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg = c = cfg
        self.query = Linear(dim, c.heads * c.key_dim, bias=False)
        self.query_norm = c.query_norm.build(c.heads * c.key_dim) if c.query_norm else None
        self.keys = nn.Parameter(torch.empty(2, math.isqrt(c.experts), c.key_dim // 2))
        self.u, self.v = nn.Embedding(c.experts, dim), nn.Embedding(c.experts, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.keys, std=(self.cfg.key_dim / 2) ** -0.5)
        for table in (self.u, self.v):
            nn.init.normal_(table.weight, std=0.02)

    def active_parameters(self) -> int:
        """What a token passes: the search, and the neurons that it finds."""
        found = self.cfg.heads * self.cfg.active * 2 * self.u.embedding_dim
        return self.query.weight.numel() + self.keys.numel() + found

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token of the heads beyond the first, which pass the same keys."""
        return 2 * (self.cfg.heads - 1) * self.keys.numel()

    def route(self, x: Tensor, inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [N, dim] -> weights and numbers of experts, [N, heads, active] each."""
        q = self.query(x)
        q = (q if self.query_norm is None else self.query_norm(q, inside)).unflatten(-1, (self.cfg.heads, -1))
        scores, at = product_topk(q, self.keys, self.cfg.active)
        scores = scores.to(torch.promote_types(x.dtype, torch.float32))
        return (scores.softmax(-1) if self.cfg.score == "softmax" else scores.sigmoid()), at

    def forward(self, x: Tensor, ctx: Ctx | None = None, state: Any = None) -> Tensor:
        inside, rows = None, x.flatten(0, -2)
        if self.training and ctx is not None and not ctx.bounds.dense:
            inside = ctx.bounds.index(x.device).flatten() >= 0
        weights, at = self.route(rows, inside)
        if ctx is not None and self.training:
            self.report(at, ctx)
        y = mix_experts(rows, self.u.weight, self.v.weight, at.flatten(1), weights.flatten(1), self.cfg.act)
        return y.view_as(x)

    def report(self, at: Tensor, ctx: Ctx) -> None:
        """How many of the experts this batch used."""
        used = torch.unique(at).numel()
        ctx.reports.metric("peer_used", torch.tensor(float(used)), self.cfg.experts)

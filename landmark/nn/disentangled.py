"""Disentangled attention: what a token says and where it stands are apart (He et al. 2020, DeBERTa; 2021, v3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Config as PlainConfig
from ..config import ModuleConfig
from ..ctx import Ctx, Relative
from ..ops.activation import Activation, activation
from ..ops.attention import attention
from .linear import Linear
from .norm import NormConfig
from .position import LearnedPositions
from .residual import Block, PostNorm


class RelativePositions(nn.Module):
    """A vector for each relative position, one table for all layers; the model puts it into `ctx.relative`.

    Row `span + d` belongs to distance d = query - key, for -span <= d < span; what is farther takes the row at the
    end. With `longest`, distances beyond span / 2 share rows in logarithmic buckets that reach to `longest` (v2, v3).
    """

    class Config(PlainConfig):
        span: int
        longest: int | None = None
        norm: NormConfig | None = None

        def check(self) -> None:
            super().check()
            if self.longest is not None and not 1 <= self.span // 2 < self.longest - 1:
                raise ValueError(
                    f"RelativePositions: buckets of a span of {self.span} cannot reach to {self.longest}; choose one "
                    f"of at least 2, and less than {max(2 * (self.longest - 1), 3)}"
                )

        def build(self, dim: int) -> RelativePositions:
            return RelativePositions(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.table = nn.Embedding(2 * cfg.span, dim)
        self.norm = cfg.norm.build(dim) if cfg.norm else None

    def forward(self, width: int) -> Relative:
        """The table, and its row for every two places in a row of `width` tokens.

        How far apart two tokens of a sequence are does not depend on where it begins: one index serves every packing.
        """
        table, span = self.table.weight, self.cfg.span
        at = torch.arange(width, device=table.device)
        row = (self.bucket(torch.arange(1 - width, width, device=table.device)) + span).clamp(0, 2 * span - 1)
        return Relative(table if self.norm is None else self.norm(table), row[at[:, None] - at + width - 1])

    def bucket(self, distance: Tensor) -> Tensor:
        """Distances as they are, or, beyond half the span, as the numbers of their buckets."""
        half, longest = self.cfg.span // 2, self.cfg.longest
        if longest is None:
            return distance
        far = distance.abs().clamp_min(half)
        reach = torch.tensor((longest - 1) / half, device=far.device)
        log = torch.log(far / half) / torch.log(reach) * (half - 1)
        return torch.where(distance.abs() <= half, distance, distance.sign() * (log.ceil().long() + half))


class DisentangledAttention(nn.Module):
    """Scores (q_t k_s + q_t K[t - s] + k_s Q[t - s]) / sqrt(terms * head_dim), where K and Q are the keys and queries
    of relative positions (He et al. 2020, eq. 4): content to content, `c2p` and `p2c`.

    `shared`: the content's own projections make K and Q (v3). `table_dropout` is that of the relative positions.
    """

    class Config(ModuleConfig):
        heads: int
        head_dim: int
        c2p: bool = True
        p2c: bool = True
        shared: bool = False
        key_bias: bool = True
        position_key_bias: bool = True
        dropout: float = 0.0
        table_dropout: float = 0.0

        def build(self, dim: int) -> DisentangledAttention:
            return DisentangledAttention(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg = c = cfg
        inner = c.heads * c.head_dim
        self.q, self.k, self.v = Linear(dim, inner), Linear(dim, inner, c.key_bias), Linear(dim, inner)
        self.out = Linear(inner, dim)
        self.position_k = Linear(dim, inner, c.position_key_bias) if c.c2p and not c.shared else None
        self.position_q = Linear(dim, inner) if c.p2c and not c.shared else None
        self.scale = (c.head_dim * (1 + c.c2p + c.p2c)) ** -0.5

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token beyond the weights', for a token that sees `context` tokens."""
        c = self.cfg
        return (4 + 2 * c.c2p + 2 * c.p2c) * context * c.heads * c.head_dim

    def forward(self, x: Tensor, ctx: Ctx, state: Any = None, queries: Tensor | None = None) -> Tensor:
        """Keys and values come from x [B, T, dim], and queries too unless they are given."""
        c = self.cfg
        q, k, v = (
            y.unflatten(-1, (c.heads, c.head_dim))
            for y in (self.q(x if queries is None else queries), self.k(x), self.v(x))
        )
        assert ctx.relative is not None, "disentangled attention needs a model with relative positions"
        y = attention(
            q, k, v, bounds=ctx.bounds, scale=self.scale, causal=False,
            bias=self.position_scores(q, k, ctx.relative) * self.scale, dropout=c.dropout if self.training else 0.0,
        )  # fmt: skip
        out: Tensor = self.out(y.flatten(-2))
        return out

    def position_scores(self, q: Tensor, k: Tensor, relative: Relative) -> Tensor:
        """q_t K[t - s] + k_s Q[t - s] for q, k [B, T, heads, d], as [B, heads, T, T]."""
        c, rows = self.cfg, relative.rows
        table = F.dropout(relative.table, c.table_dropout, self.training)

        def scores(content: Tensor, project: nn.Module | None, index: Tensor) -> Tensor:
            assert project is not None
            positions = project(table).unflatten(-1, (c.heads, c.head_dim))
            every = torch.einsum("bthd,phd->bhtp", content, positions)
            return every.gather(-1, index.expand(*every.shape[:2], -1, -1))

        parts = []
        if c.c2p:
            parts.append(scores(q, self.k if c.shared else self.position_k, rows))
        if c.p2c:
            parts.append(scores(k, self.q if c.shared else self.position_q, rows.T).mT)
        return sum(parts[1:], start=parts[0])


class Convolution(nn.Module):
    """act(dropout(W * x)): a convolution over the tokens of each sequence, with zeros beyond its ends."""

    class Config(ModuleConfig):
        kernel: int
        groups: int = 1
        act: Activation = "tanh"
        dropout: float = 0.0

        def check(self) -> None:
            super().check()
            if self.kernel % 2 == 0:
                raise ValueError(f"Convolution.kernel is {self.kernel}; only an odd one has a middle")

        def build(self, dim: int) -> Convolution:
            return Convolution(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        if dim % cfg.groups:
            raise ValueError(f"Convolution.groups is {cfg.groups}, which does not divide the width {dim}")
        self.cfg, self.act = cfg, activation(cfg.act)
        self.weight = nn.Parameter(torch.empty(dim, dim // cfg.groups, cfg.kernel))
        self.bias = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.bias)

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token: a kernel's weights are no matrix that would be counted."""
        return 2 * self.weight.numel()

    def forward(self, x: Tensor, ctx: Ctx, state: Any = None) -> Tensor:
        edge, bounds = self.cfg.kernel // 2, ctx.bounds
        if bounds.dense:
            y = F.conv1d(x.mT, self.weight, self.bias, padding=edge, groups=self.cfg.groups).mT
        else:  # all sequences in one row, with zeros between them
            index = bounds.index(x.device).flatten()
            inside = (index >= 0).nonzero().flatten()
            at = torch.arange(len(inside), device=x.device) + edge * index[inside]
            row = x.new_zeros(len(inside) + edge * len(bounds.sequences), x.shape[-1])
            row = row.index_copy(0, at, x.flatten(0, 1)[inside])
            out = F.conv1d(row.T, self.weight, self.bias, padding=edge, groups=self.cfg.groups).T
            y = torch.zeros_like(x).flatten(0, 1).index_copy(0, inside, out[at]).view_as(x)
        return self.act(F.dropout(y, self.cfg.dropout, self.training))


class Beside(nn.Module):
    """norm(layer(x) + fn(x)): a function of a layer's input joins its output (the first layer of the largest v2)."""

    class Config(ModuleConfig):
        layer: Mapping[str, ModuleConfig]
        fn: ModuleConfig
        norm: NormConfig

        def build(self, dim: int) -> Beside:
            return Beside(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.layer = Block({name: sublayer.build(dim) for name, sublayer in cfg.layer.items()})
        self.fn, self.norm = cfg.fn.build(dim), cfg.norm.build(dim)

    def forward(self, x: Tensor, ctx: Ctx, state: Any = None) -> Tensor:
        out: Tensor = self.norm(self.layer(x, ctx) + self.fn(x, ctx))
        return out


class MaskDecoder(nn.Module):
    """The enhanced mask decoder: absolute positions enter only at the end (He et al. 2020, sec. 3.2).

    A last layer applied `steps` times: its queries begin as hidden state plus position and are refined, while its keys
    and values stay the hidden state. Such is the last layer of a DeBERTa while it is pre-trained.
    """

    class Config(ModuleConfig):
        attn: DisentangledAttention.Config
        ffn: ModuleConfig
        norm: NormConfig
        positions: LearnedPositions.Config
        steps: int = 2
        dropout: float = 0.0

        def build(self, dim: int) -> MaskDecoder:
            return MaskDecoder(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg, self.positions = cfg, cfg.positions.build(dim)
        self.attn = PostNorm.Config(fn=cfg.attn, norm=cfg.norm, dropout=cfg.dropout).build(dim)
        self.ffn = PostNorm.Config(fn=cfg.ffn, norm=cfg.norm, dropout=cfg.dropout).build(dim)

    def forward(self, x: Tensor, ctx: Ctx, state: Any = None) -> Tensor:
        queries: Tensor = x + self.positions(ctx.positions, x.dtype)
        for _ in range(self.cfg.steps):
            y = F.dropout(self.attn.fn(x, ctx, queries=queries), self.cfg.dropout, self.training)
            queries = self.ffn(self.attn.norm(queries + y), ctx)
        return queries

"""Rotary positions (Su et al. 2021): queries and keys are turned by angles that grow with position, so that a score
depends on their distance only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Config as PlainConfig
from ..ctx import Ctx
from ..ops.fused import rotary
from .rope_scaling import RopeScaling, base_frequencies


class Rope:
    """Rotates heads [B, T, H, head_dim] by their positions. It has no parameters."""

    class Config(PlainConfig):
        theta: float = 10_000.0
        dim: int | None = None  # how many leading dimensions of a head turn; None: all
        interleaved: bool = False  # pairs (0, 1), (2, 3) ... as in the paper; otherwise (0, d/2), (1, d/2 + 1) ...
        scaling: RopeScaling | None = None

        def build(self, head_dim: int) -> Rope:
            return Rope(self, head_dim)

    def __init__(self, cfg: Config, head_dim: int) -> None:
        self.cfg, self.dim = cfg, cfg.dim or head_dim
        if self.dim % 2 or self.dim > head_dim:
            raise ValueError(f"rotary positions turn pairs: choose an even part of {head_dim}, not {self.dim}")

    def tables(self, ctx: Ctx, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [B, T, dim / 2], computed once a pass for all layers that share this config."""
        return ctx.memo((self.cfg, self.dim, dtype), lambda: self._tables(ctx, dtype))

    def angles(self, ctx: Ctx, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`tables` in float32, with the numbers that they have in `dtype`."""

        def wide() -> tuple[Tensor, Tensor]:
            cos, sin = self.tables(ctx, dtype)
            return cos.float().contiguous(), sin.float().contiguous()

        return ctx.memo((self.cfg, self.dim, dtype, "wide"), wide)

    def _tables(self, ctx: Ctx, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scaling, device = self.cfg.scaling, ctx.positions.device
        factor = 1.0 if scaling is None else scaling.attention_factor
        if scaling is None:
            frequencies = base_frequencies(self.cfg.theta, self.dim, device)
        else:
            totals = ctx.totals() if scaling.per_length else ctx.positions
            frequencies = scaling.frequencies(self.cfg.theta, self.dim, totals)
        angles = ctx.positions[..., None].to(torch.promote_types(dtype, torch.float32)) * frequencies
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def __call__(self, x: Tensor, ctx: Ctx) -> Tensor:
        cos, sin = self.tables(ctx, x.dtype)
        return rotary(x, cos, sin, interleaved=self.cfg.interleaved)

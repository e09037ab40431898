"""Rotary positions (Su et al. 2021): queries and keys are turned by angles that grow with position, so that a score
depends on their distance only."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..config import Config as PlainConfig
from ..ctx import Ctx
from ..ops.fused import rotary
from .rope_scaling import RopeScaling, base_frequencies

FEWEST_ROWS, MOST_ROWS = 256, 8192  # of a table of angles


class Rope:
    """Rotates heads [B, T, H, head_dim] by their positions. It has no parameters."""

    class Config(PlainConfig):
        theta: float = 10_000.0
        dim: int | None = None  # how many leading dimensions of a head turn; None: all
        interleaved: bool = False  # pairs (0, 1), (2, 3) ... as in the paper; otherwise (0, d/2), (1, d/2 + 1) ...
        scaling: RopeScaling | None = None

        def check(self) -> None:
            super().check()
            if not 0 < self.theta < math.inf:
                raise ValueError(f"the rotary base (theta) is {self.theta}; it must be above 0")

        def build(self, head_dim: int) -> Rope:
            return Rope(self, head_dim)

    def __init__(self, cfg: Config, head_dim: int) -> None:
        self.cfg, self.dim = cfg, cfg.dim or head_dim
        self._hash = hash((cfg, self.dim))
        if self.dim % 2 or self.dim > head_dim:
            raise ValueError(f"rotary positions turn pairs: choose an even part of {head_dim}, not {self.dim}")

    def tables(self, ctx: Ctx, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [B, T, dim / 2], computed once a pass for all layers that share this config."""
        return ctx.memo((self, dtype), lambda: self._tables(ctx, dtype))

    def angles(self, ctx: Ctx, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`tables` in float32, with the numbers that they have in `dtype`."""

        def wide() -> tuple[Tensor, Tensor]:
            if (rows := self._rows(ctx)) is not None:
                return _looked_up(ctx, _table(self.cfg, self.dim, dtype, rows, wide=True))
            cos, sin = self.tables(ctx, dtype)
            return cos.float().contiguous(), sin.float().contiguous()

        return ctx.memo((self, dtype, "wide"), wide)

    def _tables(self, ctx: Ctx, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if (rows := self._rows(ctx)) is not None:
            return _looked_up(ctx, _table(self.cfg, self.dim, dtype, rows))
        scaling = self.cfg.scaling
        totals = ctx.totals() if scaling is not None and scaling.per_length else ctx.positions
        return _turns(self.cfg, self.dim, dtype, ctx.positions, totals)

    def _rows(self, ctx: Ctx) -> int | None:
        """Rows of a table with those of the tokens of a pass that goes on from a state, if there is to be one."""
        if ctx.latest is None or ctx.latest >= MOST_ROWS or not ctx.positions.is_cpu or torch.compiler.is_compiling():
            return None
        if self.cfg.scaling is not None and self.cfg.scaling.per_length:
            return None
        return max(FEWEST_ROWS, 1 << ctx.latest.bit_length())

    def __call__(self, x: Tensor, ctx: Ctx) -> Tensor:
        cos, sin = self.tables(ctx, x.dtype)
        return rotary(x, cos, sin, interleaved=self.cfg.interleaved)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Rope) and (self.cfg, self.dim) == (other.cfg, other.dim))

    def __hash__(self) -> int:
        return self._hash


def _turns(cfg: Rope.Config, dim: int, dtype: torch.dtype, positions: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [..., dim / 2] for positions [...] of texts of so many tokens."""
    if cfg.scaling is None:
        factor, frequencies = 1.0, base_frequencies(cfg.theta, dim, positions.device)
    else:
        factor, frequencies = cfg.scaling.attention_factor, cfg.scaling.frequencies(cfg.theta, dim, totals)
    angles = positions[..., None].to(torch.promote_types(dtype, torch.float32)) * frequencies
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _table(cfg: Rope.Config, dim: int, dtype: torch.dtype, rows: int, wide: bool = False) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, dim / 2] of all positions below `rows`; `wide`: in float32, with the numbers of `dtype`."""
    positions = torch.arange(rows, device="cpu")
    cos, sin = _turns(cfg, dim, dtype, positions, positions)
    return (cos.float(), sin.float()) if wide else (cos, sin)


def _looked_up(ctx: Ctx, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.embedding(table[0], ctx.positions), torch.embedding(table[1], ctx.positions)

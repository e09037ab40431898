"""Absolute positions, added to the embeddings: a learned table, or sines and cosines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ModuleConfig, at_least
from .rope_scaling import base_frequencies


class LearnedPositions(nn.Module):
    """A trained vector a position; `offset` leaves that many unused rows at the start (RoBERTa: 2)."""

    class Config(ModuleConfig):
        size: int
        offset: int = at_least(0, default=0)

        def build(self, dim: int) -> LearnedPositions:
            return LearnedPositions(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.size, self.offset = cfg.size, cfg.offset
        self.table = nn.Embedding(cfg.size + cfg.offset, dim)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        out: Tensor = self.table(positions + self.offset)
        return out


class SinusoidalPositions(nn.Module):
    """sin and cos of position / 10000^(2i / dim) (Vaswani et al. 2017, sec. 3.5); it has no parameters.

    Interleaved as in the paper, or `halves`: all sines, then all cosines, as in its first public code.
    """

    class Config(ModuleConfig):
        halves: bool = False
        theta: float = 10_000.0

        def build(self, dim: int) -> SinusoidalPositions:
            return SinusoidalPositions(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg, self.dim = cfg, dim

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        angles = positions[..., None].float() * base_frequencies(self.cfg.theta, self.dim, positions.device)
        if self.cfg.halves:
            return torch.cat([angles.sin(), angles.cos()], -1).to(dtype)
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2).to(dtype)

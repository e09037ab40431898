"""Normalisation over the last axis, whole or in equal groups. Statistics are taken in at least float32."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModuleConfig
from ..ops.fused import rms_norm


class NormConfig(ModuleConfig, ABC, abstract=True):
    """A norm of width `dim`; with `groups` > 1 each of the equal parts has statistics of its own."""

    @abstractmethod
    def build(self, dim: int, groups: int = 1) -> nn.Module: ...


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016)."""

    class Config(NormConfig):
        eps: float = 1e-5
        bias: bool = True

        def build(self, dim: int, groups: int = 1) -> LayerNorm:
            return LayerNorm(self, dim, groups)

    def __init__(self, cfg: Config, dim: int, groups: int = 1) -> None:
        super().__init__()
        self.eps, self.groups = cfg.eps, _groups(dim, groups)
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if cfg.bias else None

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        parts = x.unflatten(-1, (self.groups, -1))
        y = F.layer_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * self.weight
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + weight) (Zhang & Sennrich 2019); Gemma stores its weight minus one."""

    class Config(NormConfig):
        eps: float = 1e-6
        offset: float = 0.0

        def build(self, dim: int, groups: int = 1) -> RMSNorm:
            return RMSNorm(self, dim, groups)

    def __init__(self, cfg: Config, dim: int, groups: int = 1) -> None:
        super().__init__()
        self.eps, self.offset, self.groups = cfg.eps, cfg.offset, _groups(dim, groups)
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - cfg.offset))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, offset=self.offset, groups=self.groups)


class UnitRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), without a weight (the norm of queries and keys in Llama 4)."""

    class Config(NormConfig):
        eps: float = 1e-6

        def build(self, dim: int, groups: int = 1) -> UnitRMSNorm:
            return UnitRMSNorm(self, dim, groups)

    def __init__(self, cfg: Config, dim: int, groups: int = 1) -> None:
        super().__init__()
        self.eps, self.groups = cfg.eps, _groups(dim, groups)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, None, self.eps, groups=self.groups)


def _groups(dim: int, groups: int) -> int:
    if dim % groups:
        raise ValueError(f"a norm of width {dim} has no {groups} equal groups; choose a divisor")
    return groups

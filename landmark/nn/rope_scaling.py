"""Ways to stretch rotary positions past the trained context: each gives frequencies, and a factor on the rotation.

`frequencies(theta, dim, totals)` returns angles per position, float32: [dim / 2], or [B, T, dim / 2] for the ways that
depend on the length of each token's sequence, `totals` [B, T]. Lengths are taken sequence by sequence, so a packed
document is rotated as it would be alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..config import Config


def base_frequencies(theta: float | Tensor, dim: int, device: torch.device | str | None = None) -> Tensor:
    """theta^(-2i / dim) for i < dim / 2 (Su et al. 2021, sec. 3.2.2); theta may be [..., 1]."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / theta**exponent


class RopeScaling(Config, ABC, abstract=True):
    per_length = False  # does it depend on the length of the text?

    def check(self) -> None:
        super().check()
        factor = getattr(self, "factor", 1.0)
        if not 0 < factor < math.inf:
            raise ValueError(f"{self.type_name}.factor is {factor}; rotary positions are stretched by more than 0")

    @abstractmethod
    def frequencies(self, theta: float, dim: int, totals: Tensor) -> Tensor: ...

    @property
    def attention_factor(self) -> float:
        """Multiplies cos and sin; its square is an inverse temperature on the rotated part of the scores."""
        return 1.0


class LinearRope(RopeScaling):
    """Position interpolation (Chen et al. 2023): positions divided by `factor`."""

    factor: float

    def frequencies(self, theta: float, dim: int, totals: Tensor) -> Tensor:
        return base_frequencies(theta, dim, totals.device) / self.factor


class NTKRope(RopeScaling):
    """NTK-aware: theta grows so that the slowest pair is interpolated by `factor` and the fastest hardly at all."""

    factor: float

    def frequencies(self, theta: float, dim: int, totals: Tensor) -> Tensor:
        return base_frequencies(theta * self.factor ** (dim / (dim - 2)), dim, totals.device)


class DynamicNTKRope(RopeScaling):
    """NTK-aware with a factor that grows with the text, and does nothing up to the `original` context.

    While decoding past `original`, keys keep the rotation of the moment they were cached at; a full forward rotates
    all with the final length.
    """

    factor: float
    original: int
    per_length = True

    def frequencies(self, theta: float, dim: int, totals: Tensor) -> Tensor:
        length = totals.clamp_min(self.original).float()[..., None]
        grown = theta * (self.factor * length / self.original - (self.factor - 1)) ** (dim / (dim - 2))
        return base_frequencies(grown, dim, totals.device)


class YaRN(RopeScaling):
    """Peng et al. 2023: interpolate slow pairs, leave fast ones, blend between, and cool the attention (eq. 22).

    `attention` overrides the published 0.1 ln(factor) + 1; `mscale` and `mscale_all` are DeepSeek's two weights on it.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention: float | None = None
    mscale: float | None = None
    mscale_all: float | None = None
    truncate: bool = True

    def frequencies(self, theta: float, dim: int, totals: Tensor) -> Tensor:
        base = base_frequencies(theta, dim, totals.device)

        def pair(rotations: float) -> float:
            """The pair that turns so many times over the original context."""
            return dim * math.log(self.original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(dim // 2, device=totals.device) - low) / max(high - low, 0.001)
        interpolated = ramp.clamp(0, 1)
        return base / self.factor * interpolated + base * (1 - interpolated)

    @property
    def attention_factor(self) -> float:
        if self.attention is not None:
            return self.attention
        if self.mscale and self.mscale_all:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all)
        return yarn_mscale(self.factor)


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """0.1 w ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


class LongRoPE(RopeScaling):
    """Ding et al. 2024: a searched divisor per pair, one set for texts within `original` and one for longer ones.

    While decoding across `original` the cached keys keep the short set; `infer.session` reads such a text again.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    factor: float  # extended context / original
    attention: float | None = None
    per_length = True

    def frequencies(self, theta: float, dim: int, totals: Tensor) -> Tensor:
        periods = theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=totals.device) / dim)
        short, long = (torch.tensor(x, dtype=torch.float32, device=totals.device) for x in (self.short, self.long))
        if not len(short) == len(long) == dim // 2:
            raise ValueError(f"LongRoPE needs {dim // 2} factors of each kind, not {len(short)} and {len(long)}")
        return torch.where((totals > self.original)[..., None], 1.0 / (long * periods), 1.0 / (short * periods))

    @property
    def attention_factor(self) -> float:
        if self.attention is not None:
            return self.attention
        return 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(self.original))


class Llama3Rope(RopeScaling):
    """Llama 3.1: wavelengths beyond original / low divided by `factor`, below original / high kept, blended between."""

    factor: float
    low: float
    high: float
    original: int

    def frequencies(self, theta: float, dim: int, totals: Tensor) -> Tensor:
        base = base_frequencies(theta, dim, totals.device)
        turns = self.original * base / (2 * math.pi)  # over the original context
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return base / self.factor * (1 - kept) + base * kept

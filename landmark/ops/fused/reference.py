"""Norms, gated activations and rotary embedding, written as their papers do.

All compute in float32 (float64 for float64 input) and return x's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import activation


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, groups: int = 1) -> Tensor:
    """RMSNorm (Zhang and Sennrich, 2019): x / sqrt(mean(x^2) + eps) * (offset + weight), in each of `groups` parts."""
    u = _wide(x).unflatten(-1, (groups, -1))
    y = (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        y = y * (weight.to(y.dtype) + offset)
    return y.to(x.dtype)


def glu(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    """Gated linear unit (Shazeer, 2020): act(gate) * up; act(gate) without `up`."""
    y = activation(act)(_wide(gate))
    return (y if up is None else y * _wide(up)).to(gate.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (Su et al., 2021): rotates pairs of the leading R dims of each head.

    x [B, T, H, D]; cos, sin [B or 1, T, R/2]. Pairs are (i, i + R/2), or (2i, 2i + 1) if interleaved.
    """
    half = cos.shape[-1]
    c, s = (_wide(t).unsqueeze(-2) for t in (cos, sin))  # [B or 1, T, 1, R/2]
    turn, rest = _wide(x[..., : 2 * half]), x[..., 2 * half :]
    a, b = turn.unflatten(-1, (half, 2)).unbind(-1) if interleaved else turn.chunk(2, dim=-1)
    u, v = a * c - b * s, b * c + a * s
    y = torch.stack((u, v), dim=-1).flatten(-2) if interleaved else torch.cat((u, v), dim=-1)
    return torch.cat((y.to(x.dtype), rest), dim=-1)

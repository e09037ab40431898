"""Elementwise and row-wise operations of a Transformer block, each one pass over memory.

All compute in float32 (float64 for float64 input) and return x's dtype.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..activation import check_activation
from . import cpu, reference

Backend = Literal["reference", "cpu"]


def why_not(backend: Backend, x: Tensor, *others: Tensor | None) -> str | None:
    """None if `backend` can run on x and the tensors that go with it, else why not."""
    if backend not in ("reference", "cpu"):
        raise ValueError(f"unknown backend {backend!r}: use 'reference' or 'cpu'")
    return cpu.why_not(x, *others) if backend == "cpu" else None


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    groups: int = 1,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """RMSNorm (Zhang and Sennrich, 2019): x / sqrt(mean(x^2) + eps) * (offset + weight).

    x [..., D], weight [D] or None (no scaling). The mean is over each of `groups` equal parts of the last dimension.
    """
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups {groups} must divide the last dimension, {x.shape[-1]}")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {list(weight.shape)} must be [{x.shape[-1]}], the last dimension of x")
    if _picks_cpu(backend, x, weight):
        return cpu.rms_norm(x, weight, eps, offset, groups)[0]
    return reference.rms_norm(x, weight, eps, offset, groups)


def glu(gate: Tensor, up: Tensor, act: str, *, inplace: bool = False, backend: Backend | None = None) -> Tensor:
    """Gated linear unit (Shazeer, 2020): act(gate) * up, for any name in landmark.ops.activation. Shapes are equal.
    `inplace`: what comes out may take gate's memory, where no gradient is asked for."""
    check_activation(act)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate {list(gate.shape)} {gate.dtype} and up {list(up.shape)} {up.dtype} must have one shape and dtype"
        )
    if _picks_cpu(backend, gate, up):
        return cpu.glu(gate, up, act, inplace)
    return reference.glu(gate, up, act)


def activate(x: Tensor, act: str, *, inplace: bool = False, backend: Backend | None = None) -> Tensor:
    """act(x), for any name in landmark.ops.activation; `inplace` as in `glu`."""
    check_activation(act)
    return cpu.glu(x, None, act, inplace) if _picks_cpu(backend, x) else reference.glu(x, None, act)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: Backend | None = None) -> Tensor:
    """Rotary position embedding (Su et al., 2021): rotates pairs of the leading R dimensions of each head.

    x [B, T, H, D]; cos, sin [B or 1, T, R/2], R <= D; dimensions from R on pass through. Pairs are (i, i + R/2), or
    (2i, 2i + 1) if `interleaved`. Returns [B, T, H, D].
    """
    if (
        x.ndim != 4
        or cos.ndim != 3
        or cos.shape != sin.shape
        or cos.shape[1] != x.shape[1]
        or (cos.shape[0] not in (1, x.shape[0]) or 2 * cos.shape[2] > x.shape[3])
    ):
        raise ValueError(
            f"x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}: "
            "they must be [B, T, H, D] and twice [B or 1, T, R/2] with R <= D"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        if backend == "cpu":
            raise ValueError("backend 'cpu' cannot run: it has no gradient for cos and sin")
        backend = "reference"
    if _picks_cpu(backend, x, cos, sin):
        return cpu.rotary(x, cos, sin, interleaved, False)
    return reference.rotary(x, cos, sin, interleaved=interleaved)


def _picks_cpu(backend: Backend | None, x: Tensor, *others: Tensor | None) -> bool:
    if backend is None:
        return cpu.why_not(x, *others) is None
    if (reason := why_not(backend, x, *others)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return backend == "cpu"


__all__ = ["Backend", "activate", "glu", "reference", "rms_norm", "rotary", "why_not"]

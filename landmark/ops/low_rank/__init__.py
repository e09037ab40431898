"""What an adapter of low rank adds to a linear map's output."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, reference

Backend = Literal["reference", "torch", "cpu"]


def why_not(backend: Backend, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> str | None:
    """None if `backend` can run, else why not."""
    if backend not in _RUN:
        raise ValueError(f"unknown backend {backend!r}: use 'reference', 'torch' or 'cpu'")
    return cpu.why_not(y, x, A, B) if backend == "cpu" else None


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, *, backend: Backend | None = None) -> Tensor:
    """y + scale (x A^T) B^T; y [..., out], x [..., in], A [r, in], B [out, r] -> [..., out], differentiable.

    Without gradient, y may be overwritten, and 1 to 16 rows on the processor take the time of reading the factors, if
    B's columns lie together. Factors of another dtype than x's are what it is computed in.
    """
    if x.shape[:-1] != y.shape[:-1] or A.shape != (B.shape[1], x.shape[-1]) or B.shape[0] != y.shape[-1]:
        shapes = f"y {list(y.shape)}, x {list(x.shape)}, A {list(A.shape)}, B {list(B.shape)}"
        raise ValueError(f"{shapes} must be [..., out], [..., in], [r, in], [out, r]")
    if backend is None:
        backend = "torch" if cpu.why_not(y, x, A, B) else "cpu"
    elif (reason := why_not(backend, y, x, A, B)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return _RUN[backend](y, x, A, B, scale)


def _torch(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    more = F.linear(F.linear(x.to(A.dtype), A), B).to(y.dtype)
    return torch.add(y, more, alpha=scale) if torch.is_grad_enabled() else y.add_(more, alpha=scale)


_RUN = {"reference": reference.add_low_rank, "torch": _torch, "cpu": cpu.add_low_rank}

__all__ = ["Backend", "add_low_rank", "reference", "why_not"]

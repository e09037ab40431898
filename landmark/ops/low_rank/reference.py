"""y + scale (x A^T) B^T."""

from __future__ import annotations

from torch import Tensor


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y [..., out], x [..., in], A [r, in], B [out, r] -> [..., out]."""
    return y + scale * (x @ A.mT) @ B.mT

"""Mixture of experts, written plainly: a loop over experts, and every token's answers summed by their weights."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [M, in] whose rows are sorted by expert, weight [E, out, in], counts [E] -> [M, out]."""
    parts = x.split(counts.tolist())
    return torch.cat([part @ matrix.mT for part, matrix in zip(parts, weight, strict=True)])


def spread(x: Tensor, tokens: Tensor) -> Tensor:
    """x [N, dim], tokens [M] -> [M, dim]: row i is token tokens[i]'s."""
    return x[tokens]


def combine(y: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """sum_j weights[n, j] y[places[n, j]]; y [M, dim], weights and places [N, k] -> [N, dim]. A place of -1: none."""
    wide = torch.promote_types(y.dtype, torch.float32)
    if y.shape[0] < places.numel():  # some are dropped: -1 is a last row of zeros
        y = torch.cat([y, y.new_zeros(1, y.shape[1])])
    return torch.einsum("nk,nkd->nd", weights.to(wide), y[places].to(wide)).to(y.dtype)

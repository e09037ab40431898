"""A causal depthwise convolution, written plainly: one sequence after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ctx import Bounds


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, bounds: Bounds, initial: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """y[t] = bias + sum over k of weight[k] x[t - (K - 1) + k] within each sequence."""
    taps, flat = weight.shape[1], x.flatten(0, 1)
    pieces: list[Tensor] = []
    ends: list[Tensor] = []
    past, at = x.new_zeros(taps - 1, x.shape[2]), 0
    for i, (start, length) in enumerate(bounds.sequences):
        seen = torch.cat([past if initial is None else initial[i], flat[start : start + length]])
        pieces += [x.new_zeros(start - at, x.shape[2])]
        if length:
            y = (seen.unfold(0, taps, 1) * weight).sum(-1)
            y = y if bias is None else y + bias
            pieces += [F.silu(y) if silu else y]
        ends += [seen[length:]]
        at = start + length
    pieces += [x.new_zeros(len(flat) - at, x.shape[2])]
    return torch.cat(pieces).view_as(x), torch.stack(ends) if ends else past.new_zeros(0, *past.shape)

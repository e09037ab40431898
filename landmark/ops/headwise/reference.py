"""A linear map of every head, as one writes it."""

from __future__ import annotations

import torch
from torch import Tensor


def headwise(x: Tensor, weight: Tensor) -> Tensor:
    """Shapes as in the public function; any dtype, differentiable."""
    return torch.einsum("...hi,hoi->...ho", x, weight)

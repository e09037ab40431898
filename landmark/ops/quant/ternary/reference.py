"""BitNet b1.58 (Ma et al. 2024, eq. 1 to 3), written plainly, and the layout of its published checkpoints.

A weight is divided by its mean absolute value and rounded to {-1, 0, 1}; a token's activations are scaled so that the
largest is 127, and rounded. Both are whole numbers, so their product is exact in float32 up to 131,072 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

PER_BYTE = 4  # weights
LEAST = 1e-5  # the smallest mean of weights, and the smallest largest activation, that is divided by


def wide(x: Tensor) -> torch.dtype:
    """What is computed in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def absmean(weight: Tensor) -> Tensor:
    """[1]: the mean absolute value, which a ternary weight is to be multiplied by."""
    total = torch.linalg.vector_norm(weight, 1, dtype=wide(weight))
    return (total / weight.numel()).clamp_min(LEAST).view(1)


def ternary(weight: Tensor, scale: Tensor) -> Tensor:
    """round(weight / scale) within -1 and 1, int8."""
    return (weight.to(scale.dtype) * (1 / scale)).round().clamp(-1, 1).to(torch.int8)


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., in] -> whole numbers [..., in], int8, and what x was multiplied by [..., 1]."""
    x = x.to(wide(x))
    most = x.abs().amax(-1, keepdim=True).clamp_min(LEAST)
    factor = torch.full_like(most, 127.0) / most  # 127 / most would be rounded twice
    return (x * factor).round().clamp(-128, 127).nan_to_num(0).to(torch.int8), factor


def pack(weight: Tensor) -> Tensor:
    """Ternary int8 [out, in] -> uint8 [rows, in], rows = ceil(out / 4): bits 2i and 2i + 1 of row r hold row i rows + r
    of the weight plus one, and are 0 past its end.
    """
    out, width = weight.shape
    rows = -(-out // PER_BYTE)
    bits = torch.zeros(PER_BYTE * rows, width, dtype=torch.uint8, device=weight.device)
    bits[:out] = (weight + 1).to(torch.uint8)
    parts = bits.view(PER_BYTE, rows, width)
    return parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6


def unpack(packed: Tensor, out: int) -> Tensor:
    """The inverse of `pack`: int8 [out, in]."""
    parts = [(packed >> 2 * i) & 3 for i in range(PER_BYTE)]
    return torch.cat(parts)[:out].to(torch.int8) - 1


def linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, out: int, reciprocal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., out], and the tokens as they were multiplied: whole numbers [..., in] and factors [..., 1]."""
    numbers, factor = quantise_tokens(x)
    scale = scale.to(factor.dtype)
    sums = numbers.to(factor.dtype) @ unpack(packed, out).to(factor.dtype).mT
    y = sums * ((1 / scale if reciprocal else scale) / factor)
    return (y if bias is None else y + bias).to(x.dtype), numbers, factor

"""BitNet b1.58's linear layer (Ma et al. 2024): as it is trained, and as it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.quant.ternary import absmean, bit_linear, pack, ternary, ternary_linear
from .linear import Linear, LinearConfig
from .norm import RMSNorm


class BitLinear(Linear):
    """y = round(x) round(W)^T + b with a weight in full precision, which gradients reach straight through the rounding.

    W is rounded to {-1, 0, 1} times its mean absolute value, x to 8 bits a token. `rms_norm`: x is normalised first, as
    the paper's training recipe has it where no norm stands before the layer.
    """

    class Config(LinearConfig):
        rms_norm: RMSNorm.Config | None = None

        def build(self, linear: Linear) -> BitLinear:
            return BitLinear(self, linear)

    def __init__(self, cfg: Config, like: Linear) -> None:
        where: dict[str, Any] = {"device": like.weight.device, "dtype": like.weight.dtype}
        super().__init__(like.in_features, like.out_features, like.bias is not None, **where)
        self.rms_norm = cfg.rms_norm.build(like.in_features) if cfg.rms_norm else None

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.rms_norm is None else self.rms_norm(input)
        return bit_linear(x, self.weight, self.bias)


class PackedBitLinear(nn.Module):
    """What `BitLinear` computes, from the rounded weight alone: uint8 [ceil(out / 4), in], two bits each.

    `reciprocal`: the rounded weight is divided by `weight_scale`, not multiplied ("bitlinear" among published files).
    """

    class Config(LinearConfig):
        rms_norm: RMSNorm.Config | None = None
        reciprocal: bool = False

        def build(self, linear: Linear) -> PackedBitLinear:
            return PackedBitLinear(self, linear)

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, cfg: Config, like: Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = like.weight.shape
        self.reciprocal = cfg.reciprocal
        where: dict[str, Any] = {"device": like.weight.device}
        self.register_buffer(
            "weight", torch.zeros(-(-self.out_features // 4), self.in_features, dtype=torch.uint8, **where)
        )
        self.register_buffer("weight_scale", torch.ones(1, dtype=like.weight.dtype, **where))
        bias = like.bias is not None
        self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=like.weight.dtype, **where)) if bias else None
        self.rms_norm = cfg.rms_norm.build(self.in_features) if cfg.rms_norm else None

    def reset_parameters(self) -> None:
        self.fill(torch.randn(self.out_features, self.in_features) * self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Round and pack a weight [out, in]."""
        scale = absmean(weight)
        self.weight = pack(ternary(weight, scale))
        self.weight_scale = (1 / scale if self.reciprocal else scale).to(self.weight_scale.device)

    def packed_parameters(self) -> int:
        """Weights, four to a byte."""
        return self.out_features * self.in_features

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.rms_norm is None else self.rms_norm(input)
        return ternary_linear(
            x, self.weight, self.weight_scale, self.bias, out=self.out_features, reciprocal=self.reciprocal
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, reciprocal={self.reciprocal}"

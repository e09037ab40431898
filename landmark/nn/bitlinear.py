"""BitNet b1.58's linear layer (Ma et al. 2024): as it is trained, and as it is used; one matrix, or one an expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.quant.ternary import absmean, bit_linear, pack, ternary, ternary_linear
from .linear import GroupedLinear, Linear, LinearConfig, by_expert
from .norm import RMSNorm


class Ternary(ABC):
    """What has ternary weights."""

    @abstractmethod
    def ternary_parameters(self) -> int:
        """How many."""


class BitLinear(Linear, Ternary):
    """y = round(x) round(W)^T + b with a weight in full precision, which gradients reach straight through the rounding.

    W is rounded to {-1, 0, 1} times its mean absolute value, x to 8 bits a token. `rms_norm`: x is normalised first, as
    the paper's training recipe has it where no norm stands before the layer.
    """

    class Config(LinearConfig):
        rms_norm: RMSNorm.Config | None = None

        def build(self, linear: Linear) -> BitLinear:
            return BitLinear(self, linear)

        def build_experts(self, experts: GroupedLinear) -> BitExperts:
            return BitExperts(self, experts)

    def __init__(self, cfg: Config, like: Linear) -> None:
        where: dict[str, Any] = {"device": like.weight.device, "dtype": like.weight.dtype}
        super().__init__(like.in_features, like.out_features, like.bias is not None, **where)
        self.rms_norm = cfg.rms_norm.build(like.in_features) if cfg.rms_norm else None

    def ternary_parameters(self) -> int:
        return self.weight.numel()

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.rms_norm is None else self.rms_norm(input)
        return bit_linear(x, self.weight, self.bias)


class BitExperts(GroupedLinear, Ternary):
    """`BitLinear` for a stack of matrices: each has a scale of its own."""

    def __init__(self, cfg: BitLinear.Config, like: GroupedLinear) -> None:
        super().__init__(like.experts, like.in_features, like.out_features)
        self.weight = nn.Parameter(torch.empty_like(like.weight))
        self.rms_norm = cfg.rms_norm.build(like.in_features) if cfg.rms_norm else None

    def ternary_parameters(self) -> int:
        return self.weight.numel()

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [M, in], sorted by expert, counts [experts] -> [M, out]."""
        x, weights = x if self.rms_norm is None else self.rms_norm(x), self.weight.unbind()
        return by_expert(x, counts, self.out_features, lambda rows, e: bit_linear(rows, weights[e]))


class PackedBitLinear(nn.Module, Ternary):
    """What `BitLinear` computes, from the rounded weight alone: uint8 [ceil(out / 4), in], two bits each.

    `reciprocal`: the rounded weight is divided by `weight_scale`, not multiplied ("bitlinear" among published files).
    """

    class Config(LinearConfig):
        rms_norm: RMSNorm.Config | None = None
        reciprocal: bool = False

        def build(self, linear: Linear) -> PackedBitLinear:
            return PackedBitLinear(self, linear)

        def build_experts(self, experts: GroupedLinear) -> PackedBitExperts:
            return PackedBitExperts(self, experts)

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, cfg: Config, like: Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = like.weight.shape
        self.reciprocal, dtype = cfg.reciprocal, like.weight.dtype
        device: Any = like.weight.device
        packed = torch.zeros(-(-self.out_features // 4), self.in_features, dtype=torch.uint8, device=device)
        self.register_buffer("weight", packed)
        self.register_buffer("weight_scale", torch.ones(1, dtype=dtype, device=device))
        biased = like.bias is not None
        self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device)) if biased else None
        self.rms_norm = cfg.rms_norm.build(self.in_features) if cfg.rms_norm else None

    def reset_parameters(self) -> None:
        weight, scale = packed_ternary(torch.randn(self.out_features, self.in_features) * self.in_features**-0.5)
        self.weight.copy_(weight)
        self.weight_scale.copy_(1 / scale if self.reciprocal else scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def packed_parameters(self) -> int:
        """Weights, four to a byte."""
        return self.out_features * self.in_features

    ternary_parameters = packed_parameters

    def forward(self, input: Tensor) -> Tensor:
        x, scale = input if self.rms_norm is None else self.rms_norm(input), self.weight_scale
        return ternary_linear(x, self.weight, scale, self.bias, out=self.out_features, reciprocal=self.reciprocal)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, reciprocal={self.reciprocal}"


class PackedBitExperts(nn.Module, Ternary):
    """What `BitExperts` computes, from rounded weights uint8 [experts, ceil(out / 4), in] and scales [experts, 1]."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, cfg: PackedBitLinear.Config, like: GroupedLinear) -> None:
        super().__init__()
        self.experts, self.out_features, self.in_features = like.weight.shape
        self.reciprocal, dtype = cfg.reciprocal, like.weight.dtype
        device, shape = like.weight.device, (self.experts, -(-self.out_features // 4), self.in_features)
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.ones(self.experts, 1, dtype=dtype, device=device))
        self.rms_norm = cfg.rms_norm.build(self.in_features) if cfg.rms_norm else None

    def reset_parameters(self) -> None:
        for weight, to in zip(self.weight, self.weight_scale, strict=True):
            packed, scale = packed_ternary(torch.randn(self.out_features, self.in_features) * self.in_features**-0.5)
            weight.copy_(packed)
            to.copy_(1 / scale if self.reciprocal else scale)

    def packed_parameters(self) -> int:
        """Weights, four to a byte."""
        return self.experts * self.out_features * self.in_features

    ternary_parameters = packed_parameters

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [M, in], sorted by expert, counts [experts] -> [M, out]."""
        x = x if self.rms_norm is None else self.rms_norm(x)

        def product(rows: Tensor, e: int) -> Tensor:
            weight, scale = self.weight[e], self.weight_scale[e]
            return ternary_linear(rows, weight, scale, out=self.out_features, reciprocal=self.reciprocal)

        return by_expert(x, counts, self.out_features, product)


@torch.no_grad()
def packed_ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] (or [experts, out, in]) rounded and packed, and its scale [1] (or [experts, 1])."""
    if weight.dim() == 3:
        both = [packed_ternary(w) for w in weight]
        return torch.stack([w for w, _ in both]), torch.stack([s for _, s in both])
    scale = absmean(weight)
    return pack(ternary(weight, scale)), scale

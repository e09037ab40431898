"""Weights that are kept as codes, in the place of a linear map or an embedding table: integers of 4 or 8 bits in groups
of 32, or bfloat16 in 11 bits, of which nothing is lost.

They are for use, not for training: gradients flow through them but not to them.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..ops.linear import linear
from ..ops.moe.experts import Stack
from ..ops.quant.codes import Bits, Map, encode, exact, kind, restore, restore_rows, room
from ..ops.quant.codes import linear as product
from .linear import GroupedLinear, Linear, LinearConfig, by_expert


class Codes(nn.Module):
    """A matrix [rows, width] as codes and what they need besides, which stay what they are when a model is cast; `unit`
    is what is cast."""

    codes: Tensor
    side: Tensor
    unit: Tensor

    def __init__(self, rows: int, width: int, bits: Bits, dtype: torch.dtype, device: Any = None) -> None:
        super().__init__()
        self.rows, self.width, self.bits = rows, width, bits
        codes, side, side_type = room(rows, width, bits)
        self.register_buffer("codes", torch.zeros(codes, dtype=torch.uint8, device=device))
        self.register_buffer("side", torch.zeros(side, dtype=side_type, device=device))
        self.register_buffer("unit", torch.ones((), dtype=dtype, device=device))

    def reset_parameters(self) -> None:
        weight = torch.randn(self.rows, self.width) * self.width**-0.5
        self.fill(weight.bfloat16() if self.bits == 11 else weight)
        nn.init.ones_(self.unit)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Take over a weight, as `encoded` has it."""
        self.codes, self.side = self.encoded(weight)

    def encoded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of a weight, as near as bits allow, and what they need besides. Raises ValueError for 11 bits of other
        numbers than bfloat16."""
        return encode(weight, self.bits)

    def fit(self, side: Tensor) -> None:
        """Make room for what other codes of 11 bits need besides. Raises ValueError for what does not go with a matrix
        of this size."""
        if self.bits == 11:
            exact.check_side(side, self.rows, self.width)
            self.side = self.side.new_empty(side.shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if (side := state_dict.get(f"{prefix}side")) is not None:
            self.fit(side)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def packed_parameters(self) -> int:
        """Weights, in fewer bytes than they have."""
        return self.rows * self.width

    @property
    def weight(self) -> Tensor:
        """[rows, width], restored."""
        return restore(self.codes, self.side, self.bits, self.rows, self.width, self.unit.dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None, round_x: bool = False) -> Tensor:
        """x [..., width] -> x W^T + b, [..., rows]; `round_x`: to 8 bits."""
        return product(x, self.codes, self.side, bias, self.bits, self.rows, round_x=round_x)

    def extra_repr(self) -> str:
        return f"{self.rows} x {self.width}, {self.bits} bits"


class CodedLinear(Codes):
    """y = x W^T + b with a coded W; with `round_x`, x is rounded to 8 bits in groups of 32 columns."""

    class Config(LinearConfig):
        bits: Bits
        round_x: bool = False

        def check(self) -> None:
            super().check()
            check_bits("CodedLinear.bits", self.bits)
            if self.round_x and self.bits == 11:
                raise ValueError("CodedLinear.round_x goes with 4 or 8 bits, not with 11")

        def build(self, linear: Linear) -> CodedLinear:
            return CodedLinear(self.bits, linear, self.round_x)

        def build_experts(self, experts: GroupedLinear) -> nn.Module:
            return experts if self.bits == 11 else CodedExperts(self.bits, experts, self.round_x)

    def __init__(self, bits: Bits, like: Linear, round_x: bool = False) -> None:
        weight = like.weight
        super().__init__(like.out_features, like.in_features, bits, weight.dtype, weight.device)
        self.round_x = round_x
        self.bias = None if like.bias is None else nn.Parameter(torch.zeros_like(like.bias))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input, self.bias, self.round_x)

    @property
    def map(self) -> Map:
        """Itself, for a call that takes several."""
        return Map(self.codes, self.side, self.bias, self.rows)


class CodedExperts(Codes):
    """One coded matrix an expert, in 4 or 8 bits: y = x W_e^T for rows that are sorted by expert. codes and side are
    those of the experts, stacked; what 11 bits need besides has no size that all experts share."""

    def __init__(self, bits: Bits, like: GroupedLinear, round_x: bool = False) -> None:
        weight = like.weight
        super().__init__(like.out_features, like.in_features, bits, weight.dtype, weight.device)
        self.experts, self.round_x = like.experts, round_x
        for name in ("codes", "side"):
            self.register_buffer(name, getattr(self, name).new_zeros((self.experts, *getattr(self, name).shape)))

    def reset_parameters(self) -> None:
        self.fill(torch.randn(self.experts, self.rows, self.width) * self.width**-0.5)
        nn.init.ones_(self.unit)

    def encoded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, side = zip(*(encode(each, self.bits) for each in weight), strict=True)
        return torch.stack(codes), torch.stack(side)

    def packed_parameters(self) -> int:
        return self.experts * super().packed_parameters()

    @property
    def weight(self) -> Tensor:
        """[experts, rows, width], restored."""
        dtype = self.unit.dtype
        each = zip(self.codes, self.side, strict=True)
        return torch.stack([restore(*own, self.bits, self.rows, self.width, dtype) for own in each])

    def kind(self, dtype: torch.dtype) -> int | None:
        """The kernel for x of this type; None where there is none."""
        return kind(self.bits, dtype, self.round_x)

    @property
    def stack(self) -> Stack:
        """Itself, for a call that takes several."""
        return Stack(self.codes, self.side, self.rows, self.width)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [M, width], counts [experts] -> [M, rows]."""

        def one(rows: Tensor, e: int) -> Tensor:
            return product(rows, self.codes[e], self.side[e], None, self.bits, self.rows, round_x=self.round_x)

        return by_expert(x, counts, self.rows, one)

    def extra_repr(self) -> str:
        return f"{self.experts} x {super().extra_repr()}"


class CodedEmbedding(Codes):
    """A table of vectors, of which those that are looked up are restored."""

    def forward(self, tokens: Tensor) -> Tensor:
        flat = tokens.flatten()
        found = restore_rows(self.codes, self.side, self.bits, flat, self.width, self.unit.dtype)
        return found.unflatten(0, tokens.shape)


def check_bits(name: str, bits: int | None) -> None:
    """Raise ValueError for anything but 4, 8, 11 or None."""
    if bits is not None and bits not in get_args(Bits):
        raise ValueError(f"{name} is {bits!r}; weights are kept in 4 or 8 bits, or bfloat16 in 11")


def table(rows: int, width: int, bits: Bits | None) -> nn.Embedding | CodedEmbedding:
    """An embedding table, coded where `bits` are given."""
    if bits is None:
        return nn.Embedding(rows, width)
    return CodedEmbedding(rows, width, bits, torch.get_default_dtype())


def multiply(matrix: nn.Module, x: Tensor, bias: Tensor | None, round_x: bool) -> Tensor:
    """x W^T + b by the weight of a linear map or an embedding table; `round_x` goes for coded ones."""
    if isinstance(matrix, Codes):
        return matrix.multiply(x, bias, round_x)
    weight = matrix.weight
    assert isinstance(weight, Tensor)
    return linear(x, weight, bias)

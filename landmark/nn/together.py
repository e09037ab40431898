"""Several linear maps of one input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..ops.linear import linears
from ..ops.quant.grouped import linears as coded_linears
from .codes import CodedLinear
from .linear import Linear, unhooked


def together(x: Tensor, *maps: nn.Module) -> Sequence[Tensor]:
    """What each map makes of x [..., in]; of few rows in one call where their weights say all of what they do."""
    if unhooked(*maps):
        first = maps[0]
        if all(type(m) is Linear for m in maps):
            return linears(x, [(m.weight, m.bias) for m in maps])  # type: ignore[misc]
        if type(first) is CodedLinear and all(type(m) is CodedLinear and m.bits == first.bits for m in maps):
            return coded_linears(x, [m.map for m in maps], first.bits)  # type: ignore[misc]
    return [m(x) for m in maps]

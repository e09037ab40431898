"""Several linear maps of one input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..ops.linear import linears
from ..ops.quant.codes import linears as coded_linears
from .codes import CodedLinear
from .linear import Linear, unhooked


def together(x: Tensor, *maps: nn.Module) -> Sequence[Tensor]:
    """What each map makes of x [..., in]; of few rows in one call where their weights say all of what they do."""
    if unhooked(*maps):
        plain = [m for m in maps if type(m) is Linear]
        if len(plain) == len(maps):
            return linears(x, [(m.weight, m.bias) for m in plain])
        coded = [m for m in maps if type(m) is CodedLinear]
        if len(coded) == len(maps) and len({(m.bits, m.round_x) for m in coded}) == 1:
            return coded_linears(x, [m.map for m in coded], coded[0].bits, coded[0].round_x)
    return [m(x) for m in maps]

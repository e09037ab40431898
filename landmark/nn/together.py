"""Several linear maps of one input, and what may be done where their weights say all of what they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops.linear import linears
from ..ops.quant.codes import linears as coded_linears
from .codes import CodedLinear
from .linear import Linear, unhooked

PIECE = 512  # rows of x whose inner vectors are in memory at a time: more are no faster


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


def owned(*maps: nn.Module) -> bool:
    """Whether what these make is nobody's but the caller's, who may overwrite it: no hook has seen it."""
    return unhooked(*maps) and all(type(m) is Linear or type(m) is CodedLinear for m in maps)


def by_pieces(run: Callable[[Tensor], Tensor], x: Tensor, *maps: nn.Module) -> Tensor:
    """run(x), where `run` takes each row of x [..., in] through `maps` by itself: without gradient some rows at a time,
    for what it has in between is several times as wide as x, and of a long text more than all else."""
    rows = x.numel() // max(1, x.shape[-1])
    if rows <= PIECE or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return run(x)
    if not x.is_cpu or type(x) is not Tensor or not owned(*maps):
        return run(x)
    flat = x.reshape(rows, x.shape[-1])
    first = run(flat[:PIECE])
    y = first.new_empty(rows, first.shape[-1])
    y[:PIECE] = first
    for at in range(PIECE, rows, PIECE):
        y[at : at + PIECE] = run(flat[at : at + PIECE])
    return y.view(*x.shape[:-1], y.shape[-1])

"""Token shift (Peng et al. 2023, 2305.13048, sec. 3.1): channels of a token that come from the token before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ctx import Ctx
from ..ops.activation import check_activation
from ..ops.shift import token_mix
from .cache import SlotState
from .feedforward import perceptron
from .linear import Linear


class TokenShift(nn.Module):
    """x[t] + (x[t - 1] - x[t]) m, for each of the rows m of `weight` [rows, dim]; zeros precede a sequence.

    With `own`, the weight says how much of the token itself stays: 1 - m.
    """

    def __init__(self, dim: int, rows: int, *, own: bool = False) -> None:
        super().__init__()
        self.own = own
        self.weight = nn.Parameter(torch.empty(rows, dim))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.5)

    @torch.no_grad()
    def start(self, *powers: float, shift: tuple[float, ...] = ()) -> None:
        """Begin with channel i of n keeping (i / n)^power of its own in each row, and `shift` more."""
        dim = self.weight.shape[1]
        place = torch.arange(dim, device=self.weight.device) / dim
        stays = torch.stack([place**p for p in powers])
        if shift:
            stays += torch.tensor(shift, device=stays.device)[:, None]
        self.weight.copy_(stays if self.own else 1 - stays)

    def forward(self, x: Tensor, ctx: Ctx, state: SlotState | None, mix: Tensor | None = None) -> list[Tensor]:
        """x [B, T, dim] -> one tensor a row of the weight, or of `mix`; a state holds the `last` token of each slot."""
        if mix is None:
            mix = 1 - self.weight if self.own else self.weight
        mixed, last = token_mix(x, mix, ctx.bounds, None if state is None else state.tensors["last"])
        if state is not None:
            state.tensors["last"] = last.to(state.tensors["last"].dtype)
        return mixed


class LowRank(nn.Module):
    """up(act(down(x))) through `rank` channels: what a token changes about a parameter of a mixer."""

    def __init__(self, dim: int, rank: int, out: int, *, act: str = "identity", bias: bool = True) -> None:
        super().__init__()
        self.act = check_activation(act)
        self.down, self.up = Linear(dim, rank, bias=False), Linear(rank, out, bias=bias)

    @torch.no_grad()
    def start(self, bias: Tensor | None = None, scale: float = 0.1) -> None:
        """Begin as the bias alone."""
        fill(self.down, 0)
        fill(self.up, scale)
        if bias is not None:
            self.up.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return perceptron(x, self.down, self.up, self.act)


@torch.no_grad()
def fill(linear: nn.Module, scale: float) -> None:
    """Random weights of the size of an orthogonal matrix times `scale`."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    nn.init.normal_(weight, std=scale * max(weight.shape) ** -0.5)


def zigzag(dim: int, period: int, device: torch.device) -> Tensor:
    """[dim]: from -1 to 1 within each `period`, curved: a spread of the channels of a head."""
    x = 2 * (torch.arange(dim, device=device) % period) / max(1, period - 1) - 1
    return x * x.abs()


def depth(layer: int, layers: int) -> tuple[float, float]:
    """How deep a layer is: from 0 to 1, and from 1 to almost 0."""
    return layer / max(1, layers - 1), 1 - layer / layers

"""RWKV's channel mixing: a squared-ReLU perceptron of the token and the one before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ModuleConfig
from ..ctx import Ctx
from ..ops.fused import glu
from .cache import SlotState
from .feedforward import perceptron
from .linear import Linear
from .token_shift import TokenShift, depth, fill


class RWKV7ChannelMix(nn.Module):
    """down(relu(up(k))^2) with k a mix of x[t] and x[t - 1] (2503.14456, eq. 22). `hidden` None: 4 times the width."""

    class Config(ModuleConfig):
        hidden: int | None = None

        def build(self, dim: int) -> RWKV7ChannelMix:
            return RWKV7ChannelMix(self, dim)

    rows = 1
    own = False

    def __init__(self, cfg: Config | RWKV4ChannelMix.Config, dim: int) -> None:
        super().__init__()
        hidden = cfg.hidden or 4 * dim
        self.dim = dim
        self.shift = TokenShift(dim, self.rows, own=self.own)
        self.up, self.down = Linear(dim, hidden, bias=False), Linear(hidden, dim, bias=False)

    def reset_at(self, layer: int, layers: int) -> None:
        self.shift.start(depth(layer, layers)[1] ** 4)
        nn.init.uniform_(self.up.weight, -0.5 * self.dim**-0.5, 0.5 * self.dim**-0.5)
        fill(self.down, 0)

    def new_state(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> SlotState:
        return SlotState(last=torch.zeros(slots, self.dim, dtype=dtype, device=device))

    def forward(self, x: Tensor, ctx: Ctx, state: SlotState | None = None) -> Tensor:
        (k,) = self.shift(x, ctx, state)
        return perceptron(k, self.up, self.down, "relu2")


class RWKV4ChannelMix(RWKV7ChannelMix):
    """sigmoid(gate(r)) * down(relu(up(k))^2) with k and r mixes of x[t] and x[t - 1] (2305.13048, eq. 18)."""

    class Config(ModuleConfig):
        hidden: int | None = None

        def build(self, dim: int) -> RWKV4ChannelMix:
            return RWKV4ChannelMix(self, dim)

    rows = 2  # k, r
    own = True

    def __init__(self, cfg: Config | RWKV6ChannelMix.Config, dim: int) -> None:
        super().__init__(cfg, dim)
        self.gate = Linear(dim, dim, bias=False)

    def reset_at(self, layer: int, layers: int) -> None:
        shallow = depth(layer, layers)[1]
        self.shift.start(shallow, shallow)
        for linear, scale in ((self.up, 1), (self.gate, 0), (self.down, 0)):
            fill(linear, scale)

    def forward(self, x: Tensor, ctx: Ctx, state: SlotState | None = None) -> Tensor:
        k, r = self.shift(x, ctx, state)
        return glu(self.gate(r), perceptron(k, self.up, self.down, "relu2"), "sigmoid")


class RWKV6ChannelMix(RWKV4ChannelMix):
    """That of RWKV-4; the weights of its token shift say how much comes from the token before (2404.05892, eq. 11)."""

    class Config(RWKV4ChannelMix.Config):
        def build(self, dim: int) -> RWKV6ChannelMix:
            return RWKV6ChannelMix(self, dim)

    own = False

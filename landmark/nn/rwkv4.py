"""RWKV-4 (Peng et al. 2023, 2305.13048): a recurrent mixer of vectors, trained in parallel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import ModuleConfig
from ..ctx import Ctx
from ..ops.fused import glu
from ..ops.wkv import wkv
from .cache import SlotState
from .linear import Linear
from .token_shift import TokenShift, depth, fill


class RWKV4(nn.Module):
    """out(sigmoid(r) * wkv(k, v)), where wkv averages past values with weights that decay channel by channel (eq. 14
    to 17). `inner` None: as wide as the layer."""

    class Config(ModuleConfig):
        inner: int | None = None

        def build(self, dim: int) -> RWKV4:
            return RWKV4(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.dim, self.inner = dim, cfg.inner or dim
        self.shift = TokenShift(dim, 3, own=True)  # k, v, r
        self.k, self.v, self.r = (Linear(dim, self.inner, bias=False) for _ in range(3))
        self.decay = nn.Parameter(
            torch.empty(self.inner)
        )  # log of the rate: a token's weight falls by exp(-exp(decay))
        self.bonus = nn.Parameter(torch.empty(self.inner))
        self.out = Linear(self.inner, dim, bias=False)

    @torch.no_grad()
    def reset_at(self, layer: int, layers: int) -> None:
        deep, shallow = depth(layer, layers)
        self.shift.start(shallow, shallow, 0.5 * shallow, shift=(0, 0.3 * deep, 0))
        channel = torch.arange(self.inner, device=self.decay.device)
        self.decay.copy_(-5 + 8 * (channel / max(1, self.inner - 1)) ** (0.7 + 1.3 * deep))
        self.bonus.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        for linear, scale in ((self.k, 0), (self.v, 1), (self.r, 0), (self.out, 0)):
            fill(linear, scale)

    def new_state(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> SlotState:
        wide = torch.promote_types(dtype, torch.float32)
        return SlotState(
            last=torch.zeros(slots, self.dim, dtype=dtype, device=device),
            wkv=torch.zeros(slots, 3, self.inner, dtype=wide, device=device),
        )

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token beyond the layer's own weights, however long the text."""
        return 12 * self.inner

    def forward(self, x: Tensor, ctx: Ctx, state: SlotState | None = None) -> Tensor:
        k, v, r = self.shift(x, ctx, state)
        rate = -self.decay.to(torch.promote_types(x.dtype, torch.float32)).exp()
        initial = None if state is None else state.tensors["wkv"]
        y, final = wkv(self.k(k), self.v(v), rate, self.bonus, ctx.bounds, initial)
        if state is not None:
            state.tensors["wkv"] = final
        out: Tensor = self.out(glu(self.r(r), y, "sigmoid"))
        return out

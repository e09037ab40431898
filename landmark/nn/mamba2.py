"""Mamba-2 (Dao and Gu 2024, 2405.21060): heads whose whole state decays by one number, so that chunks are attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModuleConfig
from ..ctx import Ctx
from ..ops.fused import glu
from ..ops.ssd import CHUNK, ssd
from .cache import SlotState
from .conv import ShortConv
from .linear import Linear
from .mamba import StepInit
from .norm import NormConfig, RMSNorm


class Mamba2(nn.Module):
    """out(norm(ssd(x, dt, B, C) silu(z))) where one matrix makes z, x, B, C and dt, and x, B and C pass a convolution.

    `heads` of width `head_dim`; `groups` of heads share B and C of width `state`, and each group has a norm of its own.
    `chunk`: tokens that meet as in attention while training; results do not depend on it. Steps are kept above
    `least_step` and below `most_step`.
    """

    class Config(ModuleConfig):
        heads: int
        head_dim: int = 64
        state: int = 128
        groups: int = 1
        conv: int = 4
        chunk: int = CHUNK
        bias: bool = False
        conv_bias: bool = True
        norm: NormConfig = RMSNorm.Config(eps=1e-5)
        steps: StepInit = StepInit()
        least_step: float = 0.0
        most_step: float | None = None

        def check(self) -> None:
            super().check()
            if self.heads % self.groups:
                raise ValueError(
                    f"Mamba2.groups is {self.groups}, which does not divide heads {self.heads}; choose a divisor"
                )
            if self.most_step is not None and not 0 <= self.least_step <= self.most_step:
                raise ValueError(
                    f"Mamba2.least_step is {self.least_step} and most_step {self.most_step}; they must be in order"
                )

        def build(self, dim: int) -> Mamba2:
            return Mamba2(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg, channels, shared = cfg, cfg.heads * cfg.head_dim, cfg.groups * cfg.state
        self.parts, self.mixed = [channels, channels + 2 * shared, cfg.heads], [channels, shared, shared]
        self.inner = Linear(dim, sum(self.parts), bias=cfg.bias)
        self.conv = ShortConv(self.parts[1], cfg.conv, cfg.conv_bias)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(cfg.heads)) for _ in range(3))
        self.norm = cfg.norm.build(channels, groups=cfg.groups)
        self.out = Linear(channels, dim, bias=cfg.bias)

    def reset_parameters(self) -> None:
        """A uniform between -16 and -1, D = 1, steps as in Mamba."""
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
        nn.init.ones_(self.D)
        self.cfg.steps.fill(self.dt_bias)

    def new_state(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> SlotState:
        """What lies within the convolution's reach, and the states [slots, groups, N, width] in at least float32."""
        c, wide = self.cfg, torch.promote_types(dtype, torch.float32)
        ssm = torch.zeros(slots, c.groups, c.state, self.parts[0] // c.groups, dtype=wide, device=device)
        return SlotState(conv=self.conv.room(slots, dtype, device), ssm=ssm)

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token of convolution and recurrence, however long the text."""
        return 2 * self.cfg.conv * self.parts[1] + 5 * self.cfg.state * self.parts[0]

    def forward(self, x: Tensor, ctx: Ctx, state: SlotState | None = None) -> Tensor:
        c = self.cfg
        held = state.tensors if state is not None else {}
        z, mixed, dt = self.inner(x).split(self.parts, -1)
        mixed, last = self.conv(mixed, ctx.bounds, held.get("conv"), "silu")
        x, B, C = mixed.split(self.mixed, -1)
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        if c.least_step > 0 or c.most_step is not None:
            dt = dt.clamp(c.least_step, c.most_step)
        B, C = (t.unflatten(-1, (c.groups, -1)) for t in (B, C))
        A, heads = -self.A_log.to(wide).exp(), x.unflatten(-1, (c.heads, -1))
        y, final = ssd(heads, dt, A, B, C, self.D.to(wide), ctx.bounds, held.get("ssm"), chunk=c.chunk)
        if state is not None:
            state.tensors = {"conv": last, "ssm": final}
        out: Tensor = self.out(self.norm(glu(z, y.flatten(-2), "silu")))
        return out

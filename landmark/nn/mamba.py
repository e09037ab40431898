"""Mamba (Gu and Dao 2023, 2312.00752): a state space model that chooses by token what it keeps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import Config, ModuleConfig
from ..ctx import Ctx
from ..ops.linear import linear
from ..ops.scan import selective_scan, step
from .cache import SlotState
from .conv import ShortConv
from .linear import Linear, bare
from .norm import NormConfig, RMSNorm


class StepInit(Config):
    """Steps at initialisation: log-uniform from `low` to `high`, and at least `floor` (sec. 3.6)."""

    low: float = 0.001
    high: float = 0.1
    floor: float = 1e-4

    def check(self) -> None:
        super().check()
        if not 0 < self.low <= self.high or self.floor <= 0:
            raise ValueError(
                f"StepInit has low = {self.low}, high = {self.high} and floor = {self.floor}; "
                f"steps are above 0, and low is at most high"
            )

    @torch.no_grad()
    def fill(self, bias: Tensor) -> None:
        """The numbers whose softplus are such steps."""
        low, high = math.log(self.low), math.log(self.high)
        step = torch.rand(bias.shape, device=bias.device).mul_(high - low).add_(low).exp_().clamp_min_(self.floor)
        bias.copy_(step + torch.log(-torch.expm1(-step)))


class StepSize(nn.Module):
    """The step of every channel before its softplus, from the few numbers that a token gives: `rank` -> `channels`."""

    def __init__(self, cfg: StepInit, rank: int, channels: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(channels, rank))
        self.bias = nn.Parameter(torch.empty(channels))

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        self.cfg.fill(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Mamba(nn.Module):
    """out(scan(silu(conv(x))) silu(z)) with x, z = inner(input); step, B and C of the scan are functions of x.

    `rank`: how many numbers say the steps of all channels, a sixteenth of the width unless said. `norm`: on these, on B
    and on C (Jamba, 2403.19887, sec. 6.4).
    """

    class Config(ModuleConfig):
        expand: int = 2
        state: int = 16
        conv: int = 4
        rank: int | None = None
        bias: bool = False
        conv_bias: bool = True
        norm: NormConfig | None = None
        steps: StepInit = StepInit()

        def build(self, dim: int) -> Mamba:
            return Mamba(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg, channels = cfg, cfg.expand * dim
        rank = cfg.rank or -(-dim // 16)
        self.parts = [rank, cfg.state, cfg.state]
        self.inner = Linear(dim, 2 * channels, bias=cfg.bias)
        self.conv = ShortConv(channels, cfg.conv, cfg.conv_bias)
        self.select = Linear(channels, sum(self.parts), bias=False)
        self.norms = nn.ModuleList(cfg.norm.build(n) for n in self.parts) if cfg.norm else None
        self.step = StepSize(cfg.steps, rank, channels)
        self.A_log = nn.Parameter(torch.empty(channels, cfg.state))
        self.D = nn.Parameter(torch.empty(channels))
        self.out = Linear(channels, dim, bias=cfg.bias)

    def reset_parameters(self) -> None:
        """A = -1, -2, ... -N for every channel (S4D-Real), D = 1."""
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.cfg.state + 1, device=self.A_log.device).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def new_state(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> SlotState:
        """What lies within the convolution's reach, and the states [slots, N, channels] in at least float32."""
        channels, states = self.A_log.shape
        wide = torch.promote_types(dtype, torch.float32)
        ssm = torch.zeros(slots, states, channels, dtype=wide, device=device)
        return SlotState(conv=self.conv.room(slots, dtype, device), ssm=ssm)

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token of convolution, step sizes and recurrence, however long the text."""
        channels, states = self.A_log.shape
        return channels * (2 * self.cfg.conv + 2 * self.parts[0] + 6 * states)

    def forward(self, x: Tensor, ctx: Ctx, state: SlotState | None = None) -> Tensor:
        held = state.tensors if state is not None else {}
        inner = self.inner(x)
        if state is not None and ctx.bounds.dense and ctx.bounds.width == 1:
            if (done := self._step(inner, state)) is not None:
                return done
        x, z = inner.chunk(2, -1)
        x, last = self.conv(x, ctx.bounds, held.get("conv"), "silu")
        parts = self.select(x).split(self.parts, -1)
        if self.norms is not None:
            parts = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
        few, B, C = parts
        A = -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()
        y, final = selective_scan(x, self.step(few), A, B, C, self.D, z, ctx.bounds, held.get("ssm"))
        if state is not None:
            state.tensors = {"conv": last, "ssm": final}
        out: Tensor = self.out(y)
        return out

    def _step(self, inner: Tensor, state: SlotState) -> Tensor | None:
        """`forward` of one token a sequence: what lies between the linear maps at both ends is one call; None where the
        kernel cannot run."""
        held, norms = state.tensors, [norm for norm in self.norms or () if isinstance(norm, RMSNorm)]
        if not bare(self.select) or len(norms) != len(self.norms or ()):
            return None
        scales = [norm.weight for norm in norms] or None
        weights = self.conv.weight, self.conv.bias, self.select.weight
        if step.why_not(
            inner, self.A_log, self.D, held["ssm"], *weights, *(scales or ()), self.step.weight, self.step.bias,
            held["conv"],
        ):  # fmt: skip
            return None
        y, last, ssm = step.step(
            inner, *weights, scales, self.step.weight, self.step.bias, self.A_log, self.D, held["conv"], held["ssm"],
            eps=norms[0].eps if norms else 0.0, offset=norms[0].offset if norms else 0.0,
        )  # fmt: skip
        state.tensors = {"conv": last, "ssm": ssm}
        out: Tensor = self.out(y)
        return out

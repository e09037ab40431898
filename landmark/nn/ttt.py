"""TTT layers (Sun et al. 2024, arXiv 2407.04620): what a sequence is known by is a model that learns while it is read.

Three views of a token meet the inner model: it learns to tell theta_V x from theta_K x, and answers theta_Q x.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..config import ModuleConfig
from ..ctx import Ctx
from ..ops.fast_weights import Matrices, Memory, Norm
from ..ops.ttt import ttt
from .cache import SlotState
from .fast_state import head_width, keep, known, room
from .linear import Linear
from .norm import LayerNorm
from .rope import Rope

STATE = ("base", "momentum")


class TTT(nn.Module, ABC):
    """The layer around an inner model; subclasses say which matrices that has.

    A token's rate is eta_base sigmoid(theta_lr x) / head_dim (sec. 2.7), and what the weights after the t-th token of
    a mini-batch have taken of the gradients so far is scaled by 1 / t plus something learned.
    """

    class Config(ModuleConfig, ABC, abstract=True):
        """`head_dim` None: the width / heads. `batch`: tokens of a mini-batch. `rate`: eta_base. The positions of
        `rope` count from the start of each mini-batch."""

        heads: int
        head_dim: int | None = None
        batch: int = 16
        rate: float = 1.0
        rope: Rope.Config | None = Rope.Config(interleaved=True)
        eps: float = 1e-6

        def check(self) -> None:
            super().check()
            if self.rate <= 0:
                raise ValueError(f"{self.type_name}.rate is {self.rate}; what learns needs a rate above 0")

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg, self.heads = cfg, cfg.heads
        self.head_dim = d = head_width(cfg, cfg.heads, cfg.head_dim, dim)
        inner = self.heads * d
        self.q, self.k, self.v = (Linear(dim, inner, bias=False) for _ in range(3))
        self.rate = Linear(dim, self.heads)
        self.rope = cfg.rope.build(d) if cfg.rope else None
        self.depth = len(self.shapes(d))
        for n, shape in enumerate(self.shapes(d)):  # W_0; the last row is the bias
            self.register_parameter(f"start{n}", nn.Parameter(torch.empty(self.heads, shape[0] + 1, shape[1])))
        self.scale = nn.Parameter(torch.empty(cfg.batch))
        self.norm_weight, self.norm_bias = (nn.Parameter(torch.empty(self.heads, d)) for _ in range(2))
        self.post_norm = LayerNorm.Config(eps=cfg.eps).build(inner)
        self.out = Linear(inner, dim, bias=False)

    @staticmethod
    @abstractmethod
    def shapes(d: int) -> list[tuple[int, int]]:
        """(inputs, outputs) of each matrix of the inner model for heads of width d."""

    def reset_parameters(self) -> None:
        for w in self.start():
            nn.init.normal_(w, std=0.02)
            nn.init.zeros_(w[:, -1])
        nn.init.zeros_(self.scale)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def start(self) -> Matrices:
        """W_0 [heads, in + 1, out] of every layer of the inner model."""
        return tuple(self.get_parameter(f"start{n}") for n in range(self.depth))

    def new_state(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> SlotState:
        return SlotState(**room(self.start(), slots, dtype, device, STATE))

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token beyond the layer's own weights, however long the text: every matrix of the inner model
        answers k and q, takes a gradient back (but the first) and is updated; in the dual form, a token also meets
        half of its mini-batch."""
        sizes = [i * o for i, o in self.shapes(self.head_dim)]
        meets = sum(2 * (i + o) for i, o in self.shapes(self.head_dim)) * (self.cfg.batch + 1) // 2
        return self.heads * (2 * (4 * sum(sizes) - sizes[0]) + meets)

    def forward(self, x: Tensor, ctx: Ctx, state: SlotState | None = None) -> Tensor:
        c = self.cfg
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.q(x), self.k(x), self.v(x)))
        if self.rope is not None:
            inside = ctx.memo(("ttt", c.batch), lambda: _within(ctx, c.batch))
            q, k = self.rope(q, inside), self.rope(k, inside)
        start = self.start()
        initial, past = None, ctx.past or ()
        if state is not None:
            initial = known(state, lambda: Memory.start(start, len(past)), past, STATE)
        first = torch.arange(1, c.batch + 1, device=x.device, dtype=self.scale.dtype)
        y, final = ttt(
            q, k, v, start, self.rate(x).sigmoid() * (c.rate / self.head_dim), (1 / first + self.scale).clamp_min(0),
            norm=Norm(self.norm_weight, self.norm_bias, c.eps), bounds=ctx.bounds, initial=initial,
            before=past if initial is not None else (),
        )  # fmt: skip
        if state is not None:
            keep(state, final, STATE)
        out: Tensor = self.out(self.post_norm(y.flatten(-2)))
        return out


class TTTLinear(TTT):
    """f(x) = x + LN(x W + b)."""

    class Config(TTT.Config):
        def build(self, dim: int) -> TTTLinear:
            return TTTLinear(self, dim)

    @staticmethod
    def shapes(d: int) -> list[tuple[int, int]]:
        return [(d, d)]


class TTTMLP(TTT):
    """f(x) = x + LN(gelu(x W_1 + b_1) W_2 + b_2) with a hidden layer of four times the width."""

    class Config(TTT.Config):
        rate: float = 0.1

        def build(self, dim: int) -> TTTMLP:
            return TTTMLP(self, dim)

    @staticmethod
    def shapes(d: int) -> list[tuple[int, int]]:
        return [(d, 4 * d), (4 * d, d)]


def _within(ctx: Ctx, batch: int) -> Ctx:
    """The same tokens, with positions that count from the start of each mini-batch."""
    return dataclasses.replace(ctx, positions=ctx.positions % batch, _memo={})

"""TTT layers (Sun et al. 2024, arXiv 2407.04620): what a sequence is known by is a model that learns while it is read.

Three views of a token meet the inner model: it learns to tell theta_V x from theta_K x, and answers theta_Q x.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Config as PlainConfig
from ..config import ModuleConfig
from ..ctx import Ctx
from ..ops.fast_weights import Matrices, Memory, Norm
from ..ops.ttt import ttt
from .cache import SlotState
from .conv import ShortConv
from .fast_state import head_width, memory_of, merged, put, room
from .linear import Linear
from .norm import LayerNorm
from .rope import Rope

STATE = ("base", "momentum")


class MambaBackbone(PlainConfig):
    """What TTT layers have in the Mamba backbone: queries and keys share a projection and differ by convolutions of
    `conv` tokens, and the output is gated."""

    conv: int = 4


class TTT(nn.Module, ABC):
    """The layer around an inner model; subclasses say which matrices that has.

    A token's rate is eta_base sigmoid(theta_lr x) / head_dim (sec. 2.7), and what the weights after the t-th token of
    a mini-batch have taken of the gradients so far is scaled by 1 / t plus something learned.
    """

    class Config(ModuleConfig, ABC, abstract=True):
        """`head_dim` None: the width / heads. `batch`: tokens of a mini-batch. `rate`: eta_base. The positions of
        `rope` count from the start of each mini-batch. `mamba` None: as in the Transformer backbone."""

        heads: int
        head_dim: int | None = None
        batch: int = 16
        rate: float = 1.0
        rope: Rope.Config | None = Rope.Config(interleaved=True)
        mamba: MambaBackbone | None = None
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
        self.q, self.v = (Linear(dim, inner, bias=False) for _ in range(2))
        if cfg.mamba is None:
            self.k = Linear(dim, inner, bias=False)
        else:
            self.gate = Linear(dim, inner, bias=False)
            self.conv_q, self.conv_k = (ShortConv(inner, cfg.mamba.conv) for _ in range(2))
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
        tensors = room(self.start(), slots, dtype, device, STATE)
        if self.cfg.mamba is not None:
            tensors["shared"] = self.conv_q.room(slots, dtype, device)  # both convolutions see the same tokens
        return SlotState(**tensors)

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token beyond the layer's own weights, however long the text: every matrix of the inner model
        answers k and q, takes a gradient back (but the first) and is updated; in the dual form, a token also meets
        half of its mini-batch."""
        sizes = [i * o for i, o in self.shapes(self.head_dim)]
        meets = sum(2 * (i + o) for i, o in self.shapes(self.head_dim)) * (self.cfg.batch + 1) // 2
        return self.heads * (2 * (4 * sum(sizes) - sizes[0]) + meets)

    def forward(self, x: Tensor, ctx: Ctx, state: SlotState | None = None) -> Tensor:
        c = self.cfg
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in self._views(x, ctx, state))
        if self.rope is not None:
            inside = ctx.memo(("ttt", c.batch), lambda: _within(ctx, c.batch))
            q, k = self.rope(q, inside), self.rope(k, inside)
        initial = self._known(state, ctx.past or ()) if state is not None else None
        first = torch.arange(1, c.batch + 1, device=x.device, dtype=self.scale.dtype)
        y, final = ttt(
            q, k, v, self.start(), self.rate(x).sigmoid() * (c.rate / self.head_dim),
            (1 / first + self.scale).clamp_min(0), norm=Norm(self.norm_weight, self.norm_bias, c.eps),
            bounds=ctx.bounds, initial=initial, before=(ctx.past or ()) if initial is not None else (),
        )  # fmt: skip
        if state is not None:
            put(state, final, STATE)
        y = self.post_norm(y.flatten(-2))
        if c.mamba is not None:
            y = F.gelu(self.gate(x), approximate="tanh") * y
        out: Tensor = self.out(y)
        return out

    def _views(self, x: Tensor, ctx: Ctx, state: SlotState | None) -> tuple[Tensor, Tensor, Tensor]:
        q, v = self.q(x), self.v(x)
        if self.cfg.mamba is None:
            return q, self.k(x), v
        initial = state.tensors["shared"] if state is not None else None
        k, _ = self.conv_k(q, ctx.bounds, initial)
        q, last = self.conv_q(q, ctx.bounds, initial)
        if state is not None:
            state.tensors["shared"] = last
        return q, k, v

    def _known(self, state: SlotState, past: tuple[int, ...]) -> Memory:
        """What each slot's model knows; W_0 where it has seen nothing yet."""
        if all(past):
            return memory_of(state, STATE)
        start = Memory.start(self.start(), len(past))
        if not any(past):
            return start
        new = torch.tensor([n == 0 for n in past], device=start.base[0].device)[:, None, None, None]
        return merged(new, start, memory_of(state, STATE))


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

"""Feed-forward functions: the plain perceptron and the gated family of Shazeer 2020 (GLU variants)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..config import ModuleConfig
from ..ctx import Ctx
from ..ops import feedforward as few
from ..ops.activation import Activation, activation
from ..ops.fused import activate, glu
from ..ops.step import Frame, feed_forward
from . import step
from .linear import Linear, bare
from .norm import NormConfig
from .together import by_pieces, owned, together


def perceptron(x: Tensor, up: nn.Module, down: nn.Module, act: Activation) -> Tensor:
    """down(act(up(x))), for a few tokens in one call if both are plain linear maps. x [..., in] -> [..., out]."""
    if type(up) is Linear and type(down) is Linear and bare(up, down):
        if few.why_not(x, None, up.weight, down.weight, up.bias, down.bias) is None:
            return few.feed_forward(x, None, up.weight, down.weight, act, up_bias=up.bias, down_bias=down.bias)

    def each(x: Tensor) -> Tensor:
        inner = up(x)
        out: Tensor = down(inner if act == "identity" else activate(inner, act, inplace=owned(up)))
        return out

    return by_pieces(each, x, up, down)


class MLP(nn.Module):
    """down(act(up(x))) (Vaswani et al. 2017, eq. 2)."""

    class Config(ModuleConfig):
        hidden: int
        act: Activation = "gelu"
        bias: bool = True

        def build(self, dim: int) -> MLP:
            return MLP(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        activation(cfg.act)
        self.act = cfg.act
        self.up, self.down = Linear(dim, cfg.hidden, cfg.bias), Linear(cfg.hidden, dim, cfg.bias)

    def forward(self, x: Tensor, ctx: Ctx | None = None, state: Any = None) -> Tensor:
        return perceptron(x, self.up, self.down, self.act)

    def as_terms(self, x: Tensor, frame: Frame) -> list[bytes] | None:
        """As landmark.nn.step has it."""
        first, last = step.together(x, self.up), step.linear(x, self.down)
        return None if first is None or last is None else [feed_forward(frame, first, last, self.act)]


class GLU(nn.Module):
    """down(norm(act(gate(x)) * up(x))), mostly without the norm.

    `act`: "silu" SwiGLU, "gelu" GEGLU, "relu" ReGLU, "sigmoid" GLU, "identity" bilinear (Shazeer 2020, eq. 5 and 6).
    """

    class Config(ModuleConfig):
        hidden: int
        act: Activation = "silu"
        bias: bool = False
        norm: NormConfig | None = None  # before `down` (BitNet's sub-norm)

        def build(self, dim: int) -> GLU:
            return GLU(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        activation(cfg.act)
        self.act = cfg.act
        self.gate, self.up = Linear(dim, cfg.hidden, cfg.bias), Linear(dim, cfg.hidden, cfg.bias)
        self.down = Linear(cfg.hidden, dim, cfg.bias)
        self.norm = cfg.norm.build(cfg.hidden) if cfg.norm else None

    def forward(self, x: Tensor, ctx: Ctx | None = None, state: Any = None) -> Tensor:
        if self.norm is None and self.gate.bias is None and bare(self.gate, self.up, self.down):
            weights = self.gate.weight, self.up.weight, self.down.weight
            if few.why_not(x, *weights) is None:
                return few.feed_forward(x, *weights, self.act)
        return by_pieces(self._each, x, self.gate, self.up, self.down) if self.norm is None else self._each(x)

    def _each(self, x: Tensor) -> Tensor:
        gate, up = together(x, self.gate, self.up)
        y = glu(gate, up, self.act, inplace=owned(self.gate))
        del gate, up  # `down` may have their memory
        out: Tensor = self.down(y if self.norm is None else self.norm(y))
        return out

    def as_terms(self, x: Tensor, frame: Frame) -> list[bytes] | None:
        """As landmark.nn.step has it."""
        if self.norm is not None:
            return None
        first, last = step.together(x, self.gate, self.up), step.linear(x, self.down)
        return None if first is None or last is None else [feed_forward(frame, first, last, self.act)]

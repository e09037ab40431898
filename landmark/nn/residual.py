"""Wirings: how a function of the hidden state meets the residual stream. A sublayer is wiring + norm + function.

Every sublayer, and every function inside one, is called as `f(x, ctx, state)` with x [B, T, dim]; functions that look
at one token at a time ignore the rest. `new_state` gives the part of the decoding state that belongs to a sublayer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModuleConfig
from ..ctx import Ctx
from . import step
from .norm import NormConfig


class Sublayer(nn.Module):
    """What holds one function `fn`."""

    fn: nn.Module

    def new_state(self, **where: Any) -> Any:
        return new_state(self.fn, **where)


def new_state(module: nn.Module, **where: Any) -> Any:
    """What a module remembers while decoding; None for a module that declares nothing."""
    make = getattr(module, "new_state", None)
    return make(**where) if make is not None else None


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout`, which costs a call even where it does nothing."""
    return F.dropout(x, p) if training and p else x


class PreNorm(Sublayer):
    """x + fn(norm(x)), as GPT-2 and Llama; `scale` multiplies what is added."""

    class Config(ModuleConfig):
        fn: ModuleConfig
        norm: NormConfig
        dropout: float = 0.0
        scale: float = 1.0

        def build(self, dim: int) -> PreNorm:
            return PreNorm(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.norm, self.fn = cfg.norm.build(dim), cfg.fn.build(dim)
        self.dropout, self.scale = cfg.dropout, cfg.scale

    def forward(self, x: Tensor, ctx: Ctx, state: Any = None) -> Tensor:
        if ctx.past is not None and (stepped := step.alone(self, x, ctx, state)) is not None:
            return stepped
        y = dropout(self.fn(self.norm(x), ctx, state), self.dropout, self.training)
        return x + (y if self.scale == 1.0 else y * self.scale)

    def as_steps(self, x: Tensor) -> list[step.Step] | None:
        """As landmark.nn.step has it."""
        return step.of(x, self.fn, self.norm, scale=self.scale)


class PostNorm(Sublayer):
    """norm(x + fn(x)), as the 2017 Transformer, GPT-1 and BERT."""

    class Config(ModuleConfig):
        fn: ModuleConfig
        norm: NormConfig
        dropout: float = 0.0

        def build(self, dim: int) -> PostNorm:
            return PostNorm(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.fn, self.norm, self.dropout = cfg.fn.build(dim), cfg.norm.build(dim), cfg.dropout

    def forward(self, x: Tensor, ctx: Ctx, state: Any = None) -> Tensor:
        out: Tensor = self.norm(x + dropout(self.fn(x, ctx, state), self.dropout, self.training))
        return out


class Sandwich(Sublayer):
    """x + post(fn(norm(x))), as Gemma 2; without `norm`, x + post(fn(x)), as OLMo 2."""

    class Config(ModuleConfig):
        fn: ModuleConfig
        norm: NormConfig | None
        post: NormConfig
        dropout: float = 0.0

        def build(self, dim: int) -> Sandwich:
            return Sandwich(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.norm = cfg.norm.build(dim) if cfg.norm else None
        self.fn, self.post, self.dropout = cfg.fn.build(dim), cfg.post.build(dim), cfg.dropout

    def forward(self, x: Tensor, ctx: Ctx, state: Any = None) -> Tensor:
        if ctx.past is not None and (stepped := step.alone(self, x, ctx, state)) is not None:
            return stepped
        y = self.fn(x if self.norm is None else self.norm(x), ctx, state)
        return x + dropout(self.post(y), self.dropout, self.training)

    def as_steps(self, x: Tensor) -> list[step.Step] | None:
        """As landmark.nn.step has it."""
        return step.of(x, self.fn, self.norm, self.post)


class Parallel(nn.Module):
    """x + sum of fns(norm(x)), all reading the same input: GPT-J, PaLM, Cohere.

    Where every branch has a norm of its own (GPT-NeoX), `norm` is None and the branches are `Normed`.
    """

    class Config(ModuleConfig):
        fns: Mapping[str, ModuleConfig]
        norm: NormConfig | None
        dropout: float = 0.0

        def build(self, dim: int) -> Parallel:
            return Parallel(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.norm = cfg.norm.build(dim) if cfg.norm else None
        self.fns = nn.ModuleDict({name: fn.build(dim) for name, fn in cfg.fns.items()})
        self.dropout = cfg.dropout

    def new_state(self, **where: Any) -> dict[str, Any]:
        return {name: new_state(fn, **where) for name, fn in self.fns.items()}

    def forward(self, x: Tensor, ctx: Ctx, state: Any = None) -> Tensor:
        if ctx.past is not None and (stepped := step.alone(self, x, ctx, state)) is not None:
            return stepped
        y = x if self.norm is None else self.norm(x)
        outs = [fn(y, ctx, state[name] if state else None) for name, fn in self.fns.items()]
        for out in outs:
            x = x + dropout(out, self.dropout, self.training)
        return x

    def as_steps(self, x: Tensor) -> list[step.Step] | None:
        """As landmark.nn.step has it."""
        found: list[step.Step] = []
        for name, fn in self.fns.items():
            norm, aside = self.norm, bool(found)
            if isinstance(fn, Normed):
                if norm is not None:
                    return None
                norm, fn = fn.norm, fn.fn
            if (steps := step.of(x, fn, norm, aside=aside, name=name)) is None:
                return None
            found += steps
        return found


class Normed(Sublayer):
    """fn(norm(x)), with no residual: a branch of `Parallel` that has a norm of its own."""

    class Config(ModuleConfig):
        fn: ModuleConfig
        norm: NormConfig

        def build(self, dim: int) -> Normed:
            return Normed(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.norm, self.fn = cfg.norm.build(dim), cfg.fn.build(dim)

    def forward(self, x: Tensor, ctx: Ctx, state: Any = None) -> Tensor:
        out: Tensor = self.fn(self.norm(x), ctx, state)
        return out


class Block(nn.ModuleDict):
    """One layer: named residual sublayers in order. The unit of checkpointing, compilation and sharding."""

    def new_state(self, **where: Any) -> dict[str, Any]:
        return {name: new_state(part, **where) for name, part in self.items()}

    def forward(self, x: Tensor, ctx: Ctx, state: dict[str, Any] | None = None) -> Tensor:
        for name, part in self.items():
            x = part(x, ctx, state[name] if state else None)
        return x


class Repeat(nn.Module):
    """One layer used `times` over with the same weights (ALBERT, Lan et al. 2019)."""

    class Config(ModuleConfig):
        layers: tuple[Mapping[str, ModuleConfig], ...]
        times: int

        def build(self, dim: int) -> Repeat:
            return Repeat(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.layers, self.times = build_layers(cfg.layers, dim), cfg.times

    def new_state(self, **where: Any) -> dict[str, Any]:
        return {f"{t}.{i}": new_state(x, **where) for t in range(self.times) for i, x in enumerate(self.layers)}

    def forward(self, x: Tensor, ctx: Ctx, state: dict[str, Any] | None = None) -> Tensor:
        for t in range(self.times):
            for i, layer in enumerate(self.layers):
                x = layer(x, ctx, state[f"{t}.{i}"] if state else None)
        return x


Layer = Mapping[str, ModuleConfig] | Repeat.Config


def build_layers(layers: tuple[Layer, ...], dim: int) -> nn.ModuleList:
    """A module list of one `Block` (or `Repeat`) a layer."""
    if not layers:
        raise ValueError("a model needs at least one layer")
    return nn.ModuleList(
        layer.build(dim) if isinstance(layer, Repeat.Config) else Block({n: s.build(dim) for n, s in layer.items()})
        for layer in layers
    )

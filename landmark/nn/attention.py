"""Attention with as many key-value heads as one likes: MHA, GQA (Ainslie et al. 2023) and MQA (Shazeer 2019)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config as PlainConfig
from ..config import ModuleConfig
from ..ctx import Bounds, Ctx
from ..ops.attention import attention, decode
from ..ops.attention.pages import Pages
from ..ops.step import Frame, Norm
from ..ops.step import attention as attention_step
from . import step
from .cache import CrossCache, KVCache, SlidingCache
from .chunked import ChunkCache, cut
from .linear import Linear, unhooked
from .norm import NormConfig
from .paged import PagedKV
from .rope import Rope
from .together import together


class QKNorm(ModuleConfig, ABC, abstract=True):
    """A norm on queries and keys before they meet."""

    norm: NormConfig

    @abstractmethod
    def build_heads(self, heads: int, head_dim: int) -> nn.Module:
        """A module from [B, T, heads, head_dim] to the same."""

    def build(self, dim: int) -> nn.Module:
        return self.build_heads(1, dim)


class HeadNorm(nn.Module):
    """Each head by itself, with weights that all heads share (Qwen3, Gemma 3) or, if `separate`, their own (Cohere)."""

    class Config(QKNorm):
        norm: NormConfig
        separate: bool = False

        def build_heads(self, heads: int, head_dim: int) -> HeadNorm:
            return HeadNorm(self, heads, head_dim)

    def __init__(self, cfg: Config, heads: int, head_dim: int) -> None:
        super().__init__()
        self.separate = cfg.separate
        self.norm = cfg.norm.build(heads * head_dim, groups=heads) if cfg.separate else cfg.norm.build(head_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.flatten(-2)).view_as(x) if self.separate else self.norm(x)
        return out


class ProjectionNorm(nn.Module):
    """All heads together, as one long vector (OLMo 2)."""

    class Config(QKNorm):
        norm: NormConfig

        def build_heads(self, heads: int, head_dim: int) -> ProjectionNorm:
            return ProjectionNorm(self, heads, head_dim)

    def __init__(self, cfg: Config, heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm = cfg.norm.build(heads * head_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.flatten(-2)).view_as(x)
        return out


class LogTemperature(PlainConfig):
    """Queries grow with the logarithm of their position: 1 + scale log(1 + floor((position + 1) / floor)) (Llama 4)."""

    floor: int = 8192
    scale: float = 0.1

    def factors(self, ctx: Ctx, dtype: torch.dtype) -> Tensor:
        """[B, T, 1, 1], computed once a pass."""
        return ctx.memo((self, dtype), lambda: self._factors(ctx.positions).to(dtype))

    def _factors(self, positions: Tensor) -> Tensor:
        steps = torch.floor((positions[..., None, None].float() + 1) / self.floor)
        return 1 + self.scale * torch.log1p(steps)


Cache = KVCache | SlidingCache | ChunkCache | PagedKV


class Attention(nn.Module):
    """Self-attention (Vaswani et al. 2017, sec. 3.2).

    `window`: a query sees keys at a distance below it (Mistral; GPT-3's locally banded layers). `softcap`: scores are
    squashed to cap * tanh(score / cap). `scale`: what scores are multiplied by, 1 / sqrt(head_dim) unless said.
    `out_norm`: a norm of all heads together before the output matrix (BitNet's sub-norm). `chunk`: a query sees keys
    whose position // chunk is its own (Llama 4). `temperature` multiplies queries by a factor of their position.
    """

    class Config(ModuleConfig):
        heads: int
        kv_heads: int
        head_dim: int
        bias: bool = False
        out_bias: bool = False
        rope: Rope.Config | None = None
        qk_norm: QKNorm | None = None
        out_norm: NormConfig | None = None
        causal: bool = True
        window: int | None = None
        chunk: int | None = None
        softcap: float | None = None
        scale: float | None = None
        temperature: LogTemperature | None = None
        dropout: float = 0.0

        def check(self) -> None:
            super().check()
            if self.chunk is not None and (self.window is not None or not self.causal):
                raise ValueError(f"Attention.chunk is {self.chunk}; it goes with causal attention without a window")
            if self.heads % self.kv_heads:
                raise ValueError(
                    f"Attention.kv_heads is {self.kv_heads}, which does not divide heads {self.heads}; choose a divisor"
                )

        def build(self, dim: int) -> Attention:
            return Attention(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg = c = cfg
        self.q = Linear(dim, c.heads * c.head_dim, c.bias)
        self.k = Linear(dim, c.kv_heads * c.head_dim, c.bias)
        self.v = Linear(dim, c.kv_heads * c.head_dim, c.bias)
        self.out = Linear(c.heads * c.head_dim, dim, c.out_bias)
        self.rope = c.rope.build(c.head_dim) if c.rope else None
        self.q_norm = c.qk_norm.build_heads(c.heads, c.head_dim) if c.qk_norm else None
        self.k_norm = c.qk_norm.build_heads(c.kv_heads, c.head_dim) if c.qk_norm else None
        self.out_norm = c.out_norm.build(c.heads * c.head_dim) if c.out_norm else None
        self.scale = c.head_dim**-0.5 if c.scale is None else c.scale

    def new_state(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Cache:
        c = self.cfg
        if c.chunk is not None and c.chunk < capacity:
            return ChunkCache(slots, c.chunk, c.kv_heads, c.head_dim, dtype, device)
        if c.window is not None and c.window < capacity:
            return SlidingCache(slots, c.window, c.kv_heads, c.head_dim, c.head_dim, dtype, device)
        return KVCache(slots, capacity, c.kv_heads, c.head_dim, c.head_dim, dtype, device)

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token beyond the weights', for a token that sees `context` tokens: q k^T and its product with v."""
        seen = min(context, self.cfg.window or context, self.cfg.chunk or context)
        return 4 * seen * self.cfg.heads * self.cfg.head_dim

    def forward(self, x: Tensor, ctx: Ctx, state: Cache | None = None) -> Tensor:
        c = self.cfg
        q, k, v = (
            y.view(*x.shape[:-1], heads, c.head_dim)
            for y, heads in zip(together(x, self.q, self.k, self.v), (c.heads, c.kv_heads, c.kv_heads), strict=True)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if state is not None and ctx.bounds.width == 1 and (stepped := self._step(q, k, v, ctx, state)) is not None:
            return stepped
        if self.rope is not None:
            q, k = self.rope(q, ctx), self.rope(k, ctx)
        if c.temperature is not None:
            q = q * c.temperature.factors(ctx, q.dtype)
        bounds = k_bounds = ctx.bounds if c.chunk is None else cut(ctx, c.chunk)
        if state is not None:
            k, v, k_bounds = state.extend(k, v, ctx)
        y = attention(
            q, k, v, bounds=bounds, k_bounds=k_bounds, scale=self.scale, causal=c.causal, window=c.window,
            softcap=c.softcap, dropout=c.dropout if self.training else 0.0,
        ).flatten(-2)  # fmt: skip
        return self._out(y)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, ctx: Ctx, state: Cache) -> Tensor | None:
        """One token of each sequence: turned, kept and answered in one call; None where the kernel cannot run."""
        c = self.cfg
        if (room := self._room(ctx, state)) is None:
            return None
        if not isinstance(room[2], Pages):
            room = room[0].transpose(1, 2), room[1].transpose(1, 2), room[2]
        if decode.why_not(q, *room[:2], ctx.bounds, room[2]) is not None:
            return None
        cos, sin = (None, None) if self.rope is None else self.rope.angles(ctx, q.dtype)
        fresh = decode.Fresh(k, v, cos, sin, self.rope is not None and self.rope.cfg.interleaved)
        y = decode.decode(q, *room, scale=self.scale, window=c.window, softcap=c.softcap, fresh=fresh)
        return self._out(y.flatten(-2))

    def _room(self, ctx: Ctx, state: Cache) -> tuple[Tensor, Tensor, Bounds] | None:
        """Where next keys and values go, [slots or blocks, kv_heads, tokens, head_dim], if every query is to see
        all that is kept, or a window of it."""
        c = self.cfg
        if not isinstance(state, KVCache | PagedKV) or c.temperature is not None or c.chunk is not None or not c.causal:
            return None
        return state.whole(ctx)

    def as_terms(self, x: Tensor, frame: Frame) -> list[bytes] | None:
        """As landmark.nn.step has it."""
        c, norms = self.cfg, None
        if self.out_norm is not None or c.head_dim % 16:
            return None
        if self.q_norm is not None and (norms := self._head_norms(x)) is None:
            return None
        first, last = step.together(x, self.q, self.k, self.v), step.linear(x, self.out)
        if first is None or last is None:
            return None
        turned = self.rope is not None and self.rope.cfg.interleaved
        packed = attention_step(
            frame, first, last, (c.heads, c.kv_heads, c.head_dim), turned, softmax=self.scale, softcap=c.softcap,
            head_norms=norms, dtype=x.dtype,
        )  # fmt: skip
        return [packed]

    def step_seen(self, x: Tensor, ctx: Ctx, state: Cache | None) -> tuple[int, ...] | None:
        """As landmark.nn.step has it."""
        if state is None or (lengths := ctx.bounds.filled) is None:
            return None
        if (room := self._room(ctx, state)) is None or room[0].dtype != x.dtype:
            return None
        (k, v, bounds), window, rope = room, self.cfg.window, self.rope

        def alike() -> tuple[tuple[int, ...], Any]:
            where, held = decode.places(bounds, lengths, window)
            angles = None if rope is None else rope.angles(ctx, x.dtype)
            return (*where, *decode.angles_at(angles)), (held, angles, bounds)

        rest, _ = ctx.memo(("seen", id(bounds), window, rope), alike)
        return (*decode.kept_at(k, v), *rest)

    def _head_norms(self, x: Tensor) -> tuple[Norm, Norm] | None:
        """The norms of queries and keys, if they are those of heads by themselves."""
        found = [
            step.norm(x, m.norm) if type(m) is HeadNorm and not m.separate and unhooked(m) else None
            for m in (self.q_norm, self.k_norm)
        ]
        q, k = found
        return None if q is None or k is None or q.centred or q[2:] != k[2:] else (q, k)

    def _out(self, y: Tensor) -> Tensor:
        out: Tensor = self.out(y if self.out_norm is None else self.out_norm(y))
        return out


class CrossAttention(nn.Module):
    """Queries from the hidden state, keys and values from `ctx.memory` (Vaswani et al. 2017, sec. 3.2.3)."""

    class Config(ModuleConfig):
        heads: int
        head_dim: int
        bias: bool = False
        out_bias: bool = False
        memory_dim: int | None = None
        dropout: float = 0.0

        def build(self, dim: int) -> CrossAttention:
            return CrossAttention(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg = c = cfg
        inner, memory_dim = c.heads * c.head_dim, c.memory_dim or dim
        self.q = Linear(dim, inner, c.bias)
        self.k, self.v = Linear(memory_dim, inner, c.bias), Linear(memory_dim, inner, c.bias)
        self.out = Linear(inner, dim, c.out_bias)

    def new_state(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> CrossCache:
        return CrossCache()

    def mixing_flops(self, context: int) -> int:
        """FLOPs per target token beyond the weights', for a source of `context` tokens."""
        return 4 * context * self.cfg.heads * self.cfg.head_dim

    def forward(self, x: Tensor, ctx: Ctx, state: CrossCache | None = None) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:-1], self.cfg.heads, self.cfg.head_dim)

        if state is not None and state.k is not None:
            k, v, k_bounds = state.k, state.v, state.bounds
        else:
            assert ctx.memory is not None, "cross-attention needs an encoded source in ctx.memory"
            k, v = heads(self.k(ctx.memory.hidden)), heads(self.v(ctx.memory.hidden))
            k_bounds = ctx.memory.bounds
            if state is not None:
                state.k, state.v, state.bounds = k, v, k_bounds
        assert v is not None
        y = attention(
            heads(self.q(x)), k, v, bounds=ctx.bounds, k_bounds=k_bounds, scale=self.cfg.head_dim**-0.5,
            causal=False, dropout=self.cfg.dropout if self.training else 0.0,
        )  # fmt: skip
        out: Tensor = self.out(y.flatten(-2))
        return out

"""Sliding-window attention with persistent memory: learned tokens that every query sees before all others (Titans,
Behrouz et al. 2025, sec. 3.3 and fig. 3b; Sukhbaatar et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..config import ModuleConfig
from ..ctx import Bounds, Ctx
from ..ops.attention import attention
from ..ops.chunks import Chunks
from .attention import QKNorm
from .cache import WindowCache
from .linear import Linear
from .rope import Rope


class PersistentAttention(nn.Module):
    """As `Attention` with a window, and `tokens` persistent ones: they have no place in the text, so that a text may be
    of any length, and are not turned by `rope`."""

    class Config(ModuleConfig):
        heads: int
        kv_heads: int
        head_dim: int
        window: int
        tokens: int
        rope: Rope.Config | None = None
        qk_norm: QKNorm | None = None

        def check(self) -> None:
            super().check()
            if self.heads % self.kv_heads:
                raise ValueError(
                    f"PersistentAttention.kv_heads is {self.kv_heads}, which does not divide heads {self.heads}; "
                    "choose a divisor"
                )

        def build(self, dim: int) -> PersistentAttention:
            return PersistentAttention(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg = c = cfg
        self.q = Linear(dim, c.heads * c.head_dim, bias=False)
        self.k, self.v = (Linear(dim, c.kv_heads * c.head_dim, bias=False) for _ in range(2))
        self.out = Linear(c.heads * c.head_dim, dim, bias=False)
        self.rope = c.rope.build(c.head_dim) if c.rope else None
        self.q_norm = c.qk_norm.build_heads(c.heads, c.head_dim) if c.qk_norm else None
        self.k_norm = c.qk_norm.build_heads(c.kv_heads, c.head_dim) if c.qk_norm else None
        self.persistent = nn.Parameter(torch.empty(c.tokens, dim))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.persistent)  # of the size of normalised tokens

    def new_state(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> WindowCache:
        c = self.cfg
        return WindowCache(slots, c.window, c.kv_heads, c.head_dim, c.head_dim, dtype, device)

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token beyond the weights', for a token that sees `context` tokens."""
        c = self.cfg
        return 4 * (min(context, c.window) + c.tokens) * c.heads * c.head_dim

    def forward(self, x: Tensor, ctx: Ctx, state: WindowCache | None = None) -> Tensor:
        q = _heads(self.q, self.q_norm, x, self.cfg.heads)
        k, v = self._keys(x)
        if self.rope is not None:
            q, k = self.rope(q, ctx), self.rope(k, ctx)
        first = tuple(y[0] for y in self._keys(self.persistent[None]))
        if state is not None and ctx.bounds.dense and ctx.bounds.width == 1:
            y = self._step(q, k, v, first, ctx, state)
        else:
            earlier, held = _window(state, ctx) if state is not None and any(ctx.past or ()) else (None, ())
            if state is not None:
                state.extend(k, v, ctx)
            y = windowed(
                q, k, v, first, window=self.cfg.window, scale=self.cfg.head_dim**-0.5, bounds=ctx.bounds,
                earlier=earlier, held=held,
            )  # fmt: skip
        out: Tensor = self.out(y.flatten(-2))
        return out

    def _keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c = self.cfg
        return _heads(self.k, self.k_norm, x, c.kv_heads), _heads(self.v, None, x, c.kv_heads)

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, first: tuple[Tensor, ...], ctx: Ctx, state: WindowCache
    ) -> Tensor:  # fmt: skip
        k, v, seen = state.extend(k, v, ctx)
        k, v = (torch.cat([p.expand(len(y), *p.shape), y], 1) for p, y in zip(first, (k, v), strict=True))
        lengths = tuple(n + self.cfg.tokens for _, n in seen.sequences)
        bounds = Bounds.padded(lengths, seen.width + self.cfg.tokens)
        return attention(q, k, v, bounds=ctx.bounds, k_bounds=bounds, scale=self.cfg.head_dim**-0.5, causal=True)


def _heads(project: nn.Module, norm: nn.Module | None, x: Tensor, heads: int) -> Tensor:
    y: Tensor = project(x).unflatten(-1, (heads, -1))
    return y if norm is None else norm(y)


def _window(state: WindowCache, ctx: Ctx) -> tuple[tuple[Tensor, Tensor], tuple[int, ...]]:
    """Keys and values of the `window` tokens before this call, [slots, window, heads, d], oldest first, and how many
    of each slot's there are: they stand last."""
    assert ctx.past is not None
    device, window = state.k.device, state.window
    past = torch.tensor(ctx.past, device=device)[:, None]
    ring = (past + torch.arange(window, device=device)) % window
    slots = torch.arange(len(ctx.past), device=device)[:, None]
    earlier = state.k[slots, :, ring], state.v[slots, :, ring]
    return earlier, tuple(min(n, window) for n in ctx.past)


def windowed(
    q: Tensor, k: Tensor, v: Tensor, first: tuple[Tensor, ...], *, window: int, scale: float, bounds: Bounds,
    earlier: tuple[Tensor, Tensor] | None = None, held: tuple[int, ...] = (),
) -> Tensor:  # fmt: skip
    """Causal attention in which a query sees the `first` keys and values [tokens, kv_heads, d], and those of its
    sequence at a distance below `window`.

    q [B, T, heads, d]; k, v [B, T, kv_heads, d]. `earlier` [sequences, window, kv_heads, d]: keys and values before
    this call, of which the last `held` count. Queries are taken in blocks of a window, each of which sees itself and
    the block before it, so that the cost grows with the text, not with its square.
    """
    size = min(window, max(bounds.longest, 1))
    chunks = Chunks.of(bounds, size)
    if not chunks.steps:
        return torch.zeros_like(q)
    n, tokens, device = chunks.count, len(first[0]), q.device
    place = torch.arange(size, device=device)
    masks = [torch.ones(n, size, tokens, dtype=torch.bool, device=device)]
    both: list[list[Tensor]] = [[p.expand(n, *p.shape)] for p in first]
    if len(chunks.steps) > 1 or earlier is not None:
        starts, back = chunks.steps[0].stop, torch.arange(window, device=device)
        there = torch.ones(n, 1, window, dtype=torch.bool, device=device)
        order = chunks.order[:starts].to(device)
        known = torch.tensor(held or (0,) * len(bounds.sequences), device=device)[order]
        there[:starts, 0] = back >= window - known[:, None]
        masks.append(there & (back > place[:, None]))
        for parts, y, old in zip(both, (k, v), earlier or (None, None), strict=True):
            blocks = chunks.cut(y)
            begin = old[order] if old is not None else blocks.new_zeros(starts, *blocks.shape[1:])
            before = [blocks[a][: b.stop - b.start] for a, b in zip(chunks.steps, chunks.steps[1:], strict=False)]
            parts.append(torch.cat([begin, *before]))
    masks.append((place <= place[:, None]).expand(n, -1, -1))
    keys, values = (torch.cat([*parts, chunks.cut(y)], 1) for parts, y in zip(both, (k, v), strict=True))
    y = sdpa(
        chunks.cut(q).transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2),
        attn_mask=torch.cat(masks, 2)[:, None], scale=scale, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return chunks.join(y.transpose(1, 2))

"""Titans (Behrouz et al. 2025, arXiv 2501.00663, sec. 4): three ways to put a neural memory beside attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..config import ModuleConfig, at_least
from ..ctx import Bounds, Ctx
from ..ops.chunks import Chunks
from ..ops.fast_weights import Memory
from .attention import Attention
from .cache import SlotState
from .fast_state import PARTS, keep, known
from .linear import Linear
from .neural_memory import NeuralMemory
from .norm import RMSNorm
from .persistent import PersistentAttention


class Gate(nn.Module):
    """norm(y) * silu(norm(m)): the gating of what attention says and what memory says, each normalised with weights of
    its own (sec. 4.2 leaves the non-linearity open)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.attention, self.memory = RMSNorm.Config(eps=eps).build(dim), RMSNorm.Config(eps=eps).build(dim)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        out: Tensor = self.attention(y) * F.silu(self.memory(m))
        return out


def short(attention: ModuleConfig, owner: str) -> None:
    """Raise ValueError unless the attention is one with a window."""
    if isinstance(attention, PersistentAttention.Config):
        return
    if not isinstance(attention, Attention.Config) or attention.window is None:
        raise ValueError(f"{owner}.attention is {attention!r}; take PersistentAttention, or Attention with a window")


def persistent(attention: nn.Module) -> Tensor | None:
    """The persistent tokens that the memory reads first, too: both branches see [p_1 ... p_n] || x (eq. 26)."""
    return attention.persistent if isinstance(attention, PersistentAttention) else None


class MemoryAsGate(nn.Module):
    """MAG (sec. 4.2): sliding-window attention and memory side by side, gated."""

    class Config(ModuleConfig):
        attention: ModuleConfig
        memory: NeuralMemory.Config
        eps: float = 1e-6

        def check(self) -> None:
            super().check()
            short(self.attention, "MemoryAsGate")

        def build(self, dim: int) -> MemoryAsGate:
            return MemoryAsGate(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.attention, self.memory = cfg.attention.build(dim), cfg.memory.build(dim)
        self.gate = Gate(dim, cfg.eps)
        self.out = Linear(dim, dim, bias=False)

    def new_state(self, **where: Any) -> dict[str, Any]:
        return {"attention": self.attention.new_state(**where), "memory": self.memory.new_state(**where)}  # type: ignore[operator]

    def forward(self, x: Tensor, ctx: Ctx, state: dict[str, Any] | None = None) -> Tensor:
        y = self.attention(x, ctx, state["attention"] if state else None)
        m = self.memory(x, ctx, state["memory"] if state else None, persistent(self.attention))
        out: Tensor = self.out(self.gate(y, m))
        return out


class MemoryAsLayer(nn.Module):
    """MAL (sec. 4.3): the memory reads the text, sliding-window attention reads the memory; a residual and a norm
    between them."""

    class Config(ModuleConfig):
        attention: ModuleConfig
        memory: NeuralMemory.Config
        eps: float = 1e-6

        def check(self) -> None:
            super().check()
            short(self.attention, "MemoryAsLayer")

        def build(self, dim: int) -> MemoryAsLayer:
            return MemoryAsLayer(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.attention, self.memory = cfg.attention.build(dim), cfg.memory.build(dim)
        self.norm = RMSNorm.Config(eps=cfg.eps).build(dim)

    @property
    def out(self) -> Any:
        """The matrix that ends the sublayer."""
        return self.attention.out

    def new_state(self, **where: Any) -> dict[str, Any]:
        return {"attention": self.attention.new_state(**where), "memory": self.memory.new_state(**where)}  # type: ignore[operator]

    def forward(self, x: Tensor, ctx: Ctx, state: dict[str, Any] | None = None) -> Tensor:
        m = self.memory(x, ctx, state["memory"] if state else None, persistent(self.attention))
        out: Tensor = self.attention(self.norm(x + m), ctx, state["attention"] if state else None)
        return out


class MemoryAsContext(nn.Module):
    """MAC (sec. 4.1): the text is read in segments. Each asks the memory as it was before the segment for a token h_t
    of context beside each of its own; attention within [p_1 ... p_n] || h || segment gives y; the memory learns y, and
    what it answers to y gates the output (eq. 21 - 25).

    So that no token knows a later one, query t sees h_1 ... h_t and tokens 1 ... t (and all p), and its y is gated by
    the memory after y_1 ... y_t. `rope` turns keys by their places in the concatenation.
    """

    class Config(ModuleConfig):
        """`attention` has neither window nor chunks: segments stand for them. `persistent`: the number of p."""

        attention: Attention.Config
        memory: NeuralMemory.Config
        segment: int
        persistent: int = at_least(0, default=16)
        eps: float = 1e-6

        def check(self) -> None:
            super().check()
            a = self.attention
            if not a.causal or any(x is not None for x in (a.window, a.chunk, a.softcap, a.temperature)) or a.dropout:
                raise ValueError(
                    f"MemoryAsContext.attention is {a!r}; a segment needs causal attention without window, chunk, "
                    "softcap, temperature and dropout"
                )
            if self.segment % self.memory.chunk:
                raise ValueError(
                    f"MemoryAsContext.segment is {self.segment}, no multiple of memory.chunk {self.memory.chunk}"
                )

        def build(self, dim: int) -> MemoryAsContext:
            return MemoryAsContext(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.attention, self.memory = cfg.attention.build(dim), cfg.memory.build(dim)
        self.persistent = nn.Parameter(torch.empty(cfg.persistent, dim))
        self.gate = Gate(dim, cfg.eps)
        self.out = Linear(dim, dim, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.persistent)  # of the size of normalised tokens

    def new_state(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> dict[str, SlotState]:
        a, size = self.cfg.attention, self.cfg.segment
        memory = self.memory.new_state(slots, capacity, dtype, device)
        for n in range(self.memory.cfg.depth):  # the memory as it was before the segment
            memory.tensors[f"origin{n}"] = torch.zeros_like(memory.tensors[f"base{n}"])
        shape = (slots, 2 * size, a.kv_heads, a.head_dim)  # h, then the segment
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return {"memory": memory, "segment": SlotState(k=keys, v=values)}

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token beyond the weights': attention to persistent tokens and, on average, half of a segment and of
        what it recalled; keys and values of h; and the memory's answer h."""
        c, a = self.cfg, self.cfg.attention
        seen = c.persistent + min(context, c.segment) + 1
        extra = sum(2 * p.numel() for m in (self.attention.k, self.attention.v, self.memory.q, self.memory.gate,
                                            self.memory.out) for p in m.parameters())  # fmt: skip
        asked = sum(2 * w.numel() for w in self.memory.start())
        return 4 * seen * a.heads * a.head_dim + extra + asked

    def forward(self, x: Tensor, ctx: Ctx, state: dict[str, SlotState] | None = None) -> Tensor:
        past = (ctx.past or ()) if state is not None else ()
        if state is not None and ctx.bounds.dense and ctx.bounds.width == 1:
            return self._step(x, past, state)
        c, size, bounds = self.cfg, self.cfg.segment, ctx.bounds
        chunks = Chunks.of(bounds, size, past)
        device, n = x.device, len(bounds.sequences)
        order = chunks.order.to(device)
        start = self.memory.begin(n) if state is None else known(state["memory"], lambda: self.memory.begin(n), past)
        memory = Memory(*(tuple(w[order] for w in part) for part in start))
        origin, gates, context = memory.now, None, None
        skipped = [past[i] % size if past else 0 for i in chunks.order.tolist()]
        if state is not None:
            origin = tuple(w[order] for w in self._origin(state, start, past))
            held = state["memory"].tensors.get("gates")
            gates = held[order] if held is not None else None
            context = tuple(state["segment"].tensors[name][order] for name in "kv") if any(skipped) else None
        tokens = chunks.cut(x)
        q, k, v = self._views(tokens)
        first = self._first()
        place = torch.arange(size, device=device)
        causal = place <= place[:, None]
        mask = torch.cat([causal.new_ones(size, c.persistent), causal, causal], 1)
        outs: list[Tensor] = []
        ends: list[tuple[Tensor, ...]] = []
        for number, step in enumerate(chunks.steps):
            count = step.stop - step.start
            origin = tuple(w[:count] for w in origin)
            memory = Memory(*(tuple(w[:count] for w in part) for part in memory))
            gates = gates[:count] if gates is not None else None
            _, hk, hv = self._views(self.memory.ask(tokens[step], origin), "h")
            keys, values = torch.cat([hk, k[step]], 1), torch.cat([hv, v[step]], 1)
            if number == 0 and context is not None:
                before = place < torch.tensor(skipped[:count], device=device)[:, None]
                before = before.repeat(1, 2)[..., None, None]
                keys, values = (
                    torch.where(before, old[:count], new) for old, new in zip(context, (keys, values), strict=True)
                )
            y = self._attend(q[step], keys, values, first, mask)
            skip = skipped[:count] if number == 0 else [0] * count
            lasts = (chunks.last[step] + 1).tolist()
            spans = tuple((row * size + a, b - a) for row, (a, b) in enumerate(zip(skip, lasts, strict=True)))
            full = all(a == 0 and b == size for a, b in zip(skip, lasts, strict=True))
            here = Bounds(count, size, None if full else spans)
            m, memory, gates = self.memory.read(y, here, memory, tuple(skip), gates)
            outs.append(self.gate(y, m))
            later = chunks.steps[number + 1] if number + 1 < len(chunks.steps) else slice(0, 0)
            going = later.stop - later.start
            if state is not None and going < count:
                parts = (*memory.base, *memory.now, *memory.momentum, *origin, keys, values)
                ends.insert(0, tuple(t[going:] for t in (*parts, *([gates] if gates is not None else []))))
            origin = memory.now
        if state is not None and ends:
            self._keep(state, [torch.cat(t) for t in zip(*ends, strict=True)], order)
        gated = chunks.join(torch.cat(outs)) if outs else torch.zeros_like(x)
        out: Tensor = self.out(gated)
        return out

    def _step(self, x: Tensor, past: tuple[int, ...], state: dict[str, SlotState]) -> Tensor:
        """One token for each slot."""
        size, n, device = self.cfg.segment, len(past), x.device
        places = [p % size for p in past]
        place = torch.tensor(places, device=device)
        memory = known(state["memory"], lambda: self.memory.begin(n), past)
        origin = self._origin(state, memory, past)
        q, k, v = self._views(x, place=place[:, None])
        _, hk, hv = self._views(self.memory.ask(x, origin), "h", place[:, None])
        keys, values = (state["segment"].tensors[name] for name in "kv")
        slots = torch.arange(n, device=device)
        for buffer, h, new in ((keys, hk, k), (values, hv, v)):
            buffer[slots, place], buffer[slots, size + place] = h[:, 0].to(buffer.dtype), new[:, 0].to(buffer.dtype)
        seen = torch.arange(size, device=device) <= place[:, None]
        mask = torch.cat([seen.new_ones(n, self.cfg.persistent), seen, seen], 1)[:, None, None]
        y = self._attend(q, keys, values, self._first(), mask)
        held = state["memory"].tensors.get("gates")
        m, memory, held = self.memory.read(y, Bounds(n, 1), memory, past, held)
        keep(state["memory"], memory)
        for number, w in enumerate(origin):
            state["memory"].tensors[f"origin{number}"] = w
        if held is not None:
            state["memory"].tensors["gates"] = held
        out: Tensor = self.out(self.gate(y, m))
        return out

    def _origin(self, state: dict[str, SlotState], memory: Memory, past: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The memory before each slot's segment."""
        begins = [n % self.cfg.segment == 0 for n in past]
        if all(begins):
            return memory.now
        old = tuple(state["memory"].tensors[f"origin{n}"] for n in range(len(memory.now)))
        if not any(begins):
            return old
        new = torch.tensor(begins, device=old[0].device)[:, None, None, None]
        return tuple(torch.where(new, a, b) for a, b in zip(memory.now, old, strict=True))

    def _keep(self, state: dict[str, SlotState], ends: list[Tensor], order: Tensor) -> None:
        """Put what is known after a call, in the order of the chunks, into the slots; idle ones stay."""
        depth = self.memory.cfg.depth
        names = [f"{part}{n}" for part in (*PARTS, "origin") for n in range(depth)]
        slots = order[: len(ends[0])]
        for name, new in zip([*names, "k", "v", "gates"], ends, strict=False):
            tensors = state["segment" if name in "kv" else "memory"].tensors
            tensors[name] = tensors[name].index_copy(0, slots, new.to(tensors[name].dtype))

    def _views(self, x: Tensor, what: str = "x", place: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [n, T, heads, d] of p, of h, or of tokens x [n, T, dim] at places [n, T] of their
        segments (default: 0 ... T - 1)."""
        a, c = self.attention, self.cfg
        heads = (c.attention.heads, c.attention.kv_heads, c.attention.kv_heads)
        q, k, v = (f(x).unflatten(-1, (n, -1)) for f, n in zip((a.q, a.k, a.v), heads, strict=True))
        if a.q_norm is not None and a.k_norm is not None:
            q, k = a.q_norm(q), a.k_norm(k)
        if a.rope is not None:
            if place is None:
                place = torch.arange(x.shape[1], device=x.device)[None]
            place = place + {"p": 0, "h": c.persistent, "x": c.persistent + c.segment}[what]
            at = Ctx(place, Bounds(*place.shape))
            q, k = a.rope(q, at), a.rope(k, at)
        return q, k, v

    def _first(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the persistent tokens, [1, persistent, heads, d]."""
        return self._views(self.persistent[None], "p")[1:]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, first: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """q [n, T, heads, d] over p, and k and v [n, S, heads, d], where the mask says so -> [n, T, dim]."""
        k, v = (torch.cat([p.expand(len(y), -1, -1, -1), y], 1) for p, y in zip(first, (k, v), strict=True))
        y = sdpa(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=self.attention.scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
        y = y.transpose(1, 2).flatten(-2)
        out: Tensor = self.attention.out(y if self.attention.out_norm is None else self.attention.out_norm(y))
        return out

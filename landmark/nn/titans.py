"""Titans (Behrouz et al. 2025, arXiv 2501.00663, sec. 4): three ways to put a neural memory beside attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..config import ModuleConfig, at_least
from ..ctx import Bounds, Ctx
from ..ops.chunks import Chunks
from ..ops.fast_weights import Matrices, Memory
from .attention import Attention
from .cache import SlotState
from .fast_state import PARTS
from .linear import Linear
from .neural_memory import Known, NeuralMemory
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


def rows(known: Known, which: Tensor | slice) -> Known:
    """What is known of some of the sequences."""
    memory = Memory(*(tuple(w[which] for w in part) for part in known.memory))
    return Known(memory, {name: t[which] for name, t in known.held.items()})


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
    the memory after y_1 ... y_t. `rope` turns keys by their places in the concatenation. h and y are normalised before
    they are read, as x is.
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
        self.attention = replace(cfg.attention, chunk=cfg.segment).build(dim)  # half of it is h, as half is yet to come
        self.memory = cfg.memory.build(dim)
        self.persistent = nn.Parameter(torch.empty(cfg.persistent, dim))
        self.norm_h, self.norm_y = (RMSNorm.Config(eps=cfg.eps).build(dim) for _ in range(2))
        self.gate = Gate(dim, cfg.eps)
        self.out = Linear(dim, dim, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.persistent)  # of the size of normalised tokens

    def new_state(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> dict[str, SlotState]:
        a, size = self.cfg.attention, self.cfg.segment
        memory = self.memory.new_state(slots, capacity, dtype, device)
        shape = (slots, 2 * size, a.kv_heads, a.head_dim)  # h, then the segment
        segment = {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")}
        for n in range(self.memory.cfg.depth):  # the memory as it was before the segment
            segment[f"origin{n}"] = torch.zeros_like(memory.tensors[f"base{n}"])
        if "conv_q" in memory.tensors:  # what asks for h is convolved by itself
            segment["asked"] = torch.zeros_like(memory.tensors["conv_q"])
        return {"memory": memory, "segment": SlotState(**segment)}

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token beyond the weights' and what attention and memory say themselves: persistent tokens, keys
        and values of h, and the memory's answer h."""
        a, m = self.cfg.attention, self.memory
        again = (self.attention.k, self.attention.v, m.q, m.gate, m.out)
        weights = sum(p.numel() for layer in again for p in layer.parameters()) + sum(w.numel() for w in m.start())
        return 4 * self.cfg.persistent * a.heads * a.head_dim + 2 * weights

    def forward(self, x: Tensor, ctx: Ctx, state: dict[str, SlotState] | None = None) -> Tensor:
        past = (ctx.past or ()) if state is not None else ()
        if state is not None and ctx.bounds.dense and ctx.bounds.width == 1:
            return self._step(x, past, state)
        size, bounds = self.cfg.segment, ctx.bounds
        chunks = Chunks.of(bounds, size, past)
        order = chunks.order.to(x.device)
        known = self.memory.begin(len(bounds.sequences)) if state is None else self.memory.known(state["memory"], past)
        origin = known.memory.now if state is None else self._origin(state, known.memory, past)
        known, origin = rows(known, order), tuple(w[order] for w in origin)
        asking, asked = self.memory.view("q", x, bounds, state["segment"].tensors.get("asked") if state else None)
        tokens, asking = chunks.cut(x), chunks.cut(asking)
        q, (k, v) = self._queries(tokens), self._keys(tokens, "x")
        skipped = [past[i] % size for i in chunks.order.tolist()] if past else [0] * len(order)
        context = tuple(state["segment"].tensors[name][order] for name in "kv") if state and any(skipped) else None
        place = torch.arange(size, device=x.device)
        causal = place <= place[:, None]
        mask = torch.cat([causal.new_ones(size, self.cfg.persistent), causal, causal], 1)
        first = self._keys(self.persistent[None], "p")
        outs: list[Tensor] = []
        ends: list[tuple[Known, tuple[Tensor, ...]]] = []
        for number, step in enumerate(chunks.steps):
            count = step.stop - step.start
            if count < len(origin[0]):
                known, origin = rows(known, slice(count)), tuple(w[:count] for w in origin)
            hk, hv = self._keys(self.norm_h(self.memory.ask(asking[step], tokens[step], origin)), "h")
            keys, values = torch.cat([hk, k[step]], 1), torch.cat([hv, v[step]], 1)
            skip = skipped[:count] if number == 0 else [0] * count
            if number == 0 and context is not None:
                there = (place < torch.tensor(skip, device=x.device)[:, None]).repeat(1, 2)[..., None, None]
                keys, values = (torch.where(there, a[:count], b) for a, b in zip(context, (keys, values), strict=True))
            y = self._attend(q[step], keys, values, first, mask)
            filled = (chunks.last[step] + 1).tolist()
            spans = tuple((row * size + a, b - a) for row, (a, b) in enumerate(zip(skip, filled, strict=True)))
            whole = all(length == size for _, length in spans)
            m, known = self.memory.read(y, Bounds(count, size, None if whole else spans), known, tuple(skip))
            outs.append(self.gate(y, m))
            going = chunks.steps[number + 1] if number + 1 < len(chunks.steps) else slice(0, 0)
            if state is not None and (left := going.stop - going.start) < count:
                ends.insert(0, (rows(known, slice(left, None)), tuple(t[left:] for t in (*origin, keys, values))))
            origin = known.memory.now
        if state is not None:
            self._keep(state, ends, order)
            if asked is not None:
                state["segment"].tensors["asked"] = asked
        out: Tensor = self.out(chunks.join(torch.cat(outs)) if outs else torch.zeros_like(x))
        return out

    def _step(self, x: Tensor, past: tuple[int, ...], state: dict[str, SlotState]) -> Tensor:
        """One token for each slot."""
        size, n, segment = self.cfg.segment, len(past), state["segment"].tensors
        place = torch.tensor([p % size for p in past], device=x.device)
        known = self.memory.known(state["memory"], past)
        origin = self._origin(state, known.memory, past)
        q, (k, v) = self._queries(x, place[:, None]), self._keys(x, "x", place[:, None])
        asking, asked = self.memory.view("q", x, Bounds(n, 1), segment.get("asked"))
        hk, hv = self._keys(self.norm_h(self.memory.ask(asking, x, origin)), "h", place[:, None])
        slots = torch.arange(n, device=x.device)
        for name, h, new in (("k", hk, k), ("v", hv, v)):
            segment[name][slots, place], segment[name][slots, size + place] = h[:, 0], new[:, 0]
        seen = torch.arange(size, device=x.device) <= place[:, None]
        mask = torch.cat([seen.new_ones(n, self.cfg.persistent), seen, seen], 1)[:, None, None]
        y = self._attend(q, segment["k"], segment["v"], self._keys(self.persistent[None], "p"), mask)
        m, known = self.memory.read(y, Bounds(n, 1), known, past)
        self.memory.keep(state["memory"], known)
        segment |= {f"origin{number}": w for number, w in enumerate(origin)}
        if asked is not None:
            segment["asked"] = asked
        out: Tensor = self.out(self.gate(y, m))
        return out

    def _origin(self, state: dict[str, SlotState], memory: Memory, past: tuple[int, ...]) -> Matrices:
        """The memory before each slot's segment."""
        begins = [n % self.cfg.segment == 0 for n in past]
        if all(begins):
            return memory.now
        old = tuple(state["segment"].tensors[f"origin{n}"] for n in range(len(memory.now)))
        if not any(begins):
            return old
        new = torch.tensor(begins, device=old[0].device)[:, None, None, None]
        return tuple(torch.where(new, a, b) for a, b in zip(memory.now, old, strict=True))

    def _keep(self, state: dict[str, SlotState], ends: list[tuple[Known, tuple[Tensor, ...]]], order: Tensor) -> None:
        """Put what is known after a call, in the order of the chunks, into the slots; those without tokens stay."""
        if not ends:
            return
        held = {name: torch.cat([known.held[name] for known, _ in ends]) for name in ends[0][0].held}
        for part in PARTS:
            for n, pieces in enumerate(zip(*(getattr(known.memory, part) for known, _ in ends), strict=True)):
                held[f"{part}{n}"] = torch.cat(pieces)
        names = [*(f"origin{n}" for n in range(self.memory.cfg.depth)), "k", "v"]
        kept = dict(zip(names, (torch.cat(t) for t in zip(*(rest for _, rest in ends), strict=True)), strict=True))
        for which, tensors in (("memory", held), ("segment", kept)):
            old = state[which].tensors
            for name, new in tensors.items():
                old[name] = old[name].index_copy(0, order[: len(new)], new.to(old[name].dtype))

    def _queries(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        """Queries [n, T, heads, d] of tokens x [n, T, dim] at places [n, T] of their segments; None: 0 ... T - 1."""
        a = self.attention
        q: Tensor = a.q(x).unflatten(-1, (self.cfg.attention.heads, -1))
        return self._turned(q if a.q_norm is None else a.q_norm(q), "x", place)

    def _keys(self, x: Tensor, what: str, place: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [n, T, kv_heads, d] of p, of h, or of tokens x."""
        a = self.attention
        k, v = (f(x).unflatten(-1, (self.cfg.attention.kv_heads, -1)) for f in (a.k, a.v))
        return self._turned(k if a.k_norm is None else a.k_norm(k), what, place), v

    def _turned(self, y: Tensor, what: str, place: Tensor | None) -> Tensor:
        """Rotary positions: the places in p_1 ... p_n || h || segment."""
        if self.attention.rope is None:
            return y
        if place is None:
            place = torch.arange(y.shape[1], device=y.device)[None]
        place = place + {"p": 0, "h": self.cfg.persistent, "x": self.cfg.persistent + self.cfg.segment}[what]
        return self.attention.rope(y, Ctx(place, Bounds(*place.shape)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, first: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """q [n, T, heads, d] over p, and k and v [n, S, heads, d], where the mask says so -> [n, T, dim]."""
        k, v = (torch.cat([p.expand(len(y), -1, -1, -1), y], 1) for p, y in zip(first, (k, v), strict=True))
        y = sdpa(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=self.attention.scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
        y = y.transpose(1, 2).flatten(-2)
        y = y if self.attention.out_norm is None else self.attention.out_norm(y)
        out: Tensor = self.norm_y(self.attention.out(y))
        return out

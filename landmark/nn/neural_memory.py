"""The neural long-term memory of Titans (Behrouz et al. 2025, arXiv 2501.00663, sec. 3 and 4.4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Config as PlainConfig
from ..config import ModuleConfig
from ..ctx import Bounds, Ctx
from ..ops.fast_weights import GELU, Act, Matrices, Memory, Net, Norm, recall
from ..ops.fused import rms_norm
from ..ops.titans import neural_memory
from .cache import SlotState
from .conv import ShortConv
from .fast_state import head_width, memory_of, merged, put, room
from .linear import Linear
from .norm import RMSNorm


class GatesConfig(PlainConfig, ABC, abstract=True):
    """How forgetting (alpha), lasting (eta) and learning (theta) depend on the text."""

    rate: float = 0.1  # theta stays below it
    forget: float = -6.0  # where the gates begin, before their sigmoids; the paper does not say
    persist: float = 0.0
    learn: float = 0.0

    def check(self) -> None:
        super().check()
        if self.rate <= 0:
            raise ValueError(f"{self.type_name}.rate is {self.rate}; what learns needs a rate above 0")

    @abstractmethod
    def build(self, dim: int, heads: int) -> TokenGates: ...


class TokenGates(nn.Module):
    """Functions of the token, as in the paper's experiments."""

    class Config(GatesConfig):
        def build(self, dim: int, heads: int) -> TokenGates:
            return TokenGates(self, dim, heads)

    def __init__(self, cfg: GatesConfig, dim: int, heads: int) -> None:
        super().__init__()
        self.cfg, self.heads = cfg, heads
        self.project = Linear(dim, 3 * heads, bias=False)
        self.bias = nn.Parameter(torch.empty(3, heads))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.bias.copy_(torch.tensor([self.cfg.forget, self.cfg.persist, self.cfg.learn])[:, None])

    def held(self, slots: int) -> tuple[int, ...] | None:
        """The shape of what is kept between calls, if anything is."""
        return None

    def forward(
        self, x: Tensor, chunk: int, bounds: Bounds, before: tuple[int, ...], held: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Alpha, eta and theta [B, T, heads] of x [B, T, dim], and what is kept."""
        values = (self.project(x).unflatten(-1, (3, self.heads)) + self.bias).sigmoid()
        values, held = self.shared(values, chunk, bounds, before, held)
        forget, persist, rate = values.unbind(-2)
        return forget, persist, rate * self.cfg.rate, held

    def shared(
        self, values: Tensor, chunk: int, bounds: Bounds, before: tuple[int, ...], held: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        return values, None


class ChunkGates(TokenGates):
    """One value for a chunk (sec. 3.2, "Parameters as the Function of Chunks"): that of its first token, as no token
    may depend on later ones."""

    class Config(GatesConfig):
        def build(self, dim: int, heads: int) -> ChunkGates:
            return ChunkGates(self, dim, heads)

    def held(self, slots: int) -> tuple[int, ...] | None:
        return slots, 3, self.heads

    def shared(
        self, values: Tensor, chunk: int, bounds: Bounds, before: tuple[int, ...], held: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        offsets = bounds.offsets(values.device)
        past = torch.tensor(before or (0,) * len(bounds.sequences), device=values.device)
        place = (offsets + bounds.per_token(past)) % chunk
        back = torch.minimum(place, offsets)
        first = torch.arange(bounds.width, device=values.device) - back
        values = values.gather(1, first[..., None, None].expand_as(values))
        if held is None:
            return values, None
        values = torch.where((place > offsets)[..., None, None], held[bounds.index(values.device).clamp_min(0)], values)
        lasts = [start + length - 1 for start, length in bounds.sequences]
        idle = torch.tensor([length == 0 for _, length in bounds.sequences], device=values.device)[:, None, None]
        index = torch.tensor(lasts, device=values.device).clamp_min(0)
        return values, torch.where(idle, held, values.flatten(0, 1)[index])


class Known(NamedTuple):
    """What a layer knows of each sequence: its memory, and by name what else the next call needs."""

    memory: Memory
    held: dict[str, Tensor]


class NeuralMemory(nn.Module):
    """A memory that learns at test time: M maps keys to values, is moved by its surprise, and answers queries.

    Alone it is the paper's LMM. Queries, keys and values are silu of convolved linear maps, queries and keys of unit
    length; answers are normalised and gated before the output matrix (sec. 4.4).
    """

    class Config(ModuleConfig):
        """`head_dim` None: the width / heads; one head is the paper's memory. `depth`: matrices of M, with hidden
        layers `expansion` times as wide; `residual`: M(x) = x + LN(MLP(x)), otherwise MLP(x); `conv`: the tokens that
        the convolutions of queries, keys and values weigh (None: there are none)."""

        heads: int
        head_dim: int | None = None
        depth: int = 2
        expansion: int = 4
        act: Act = "gelu"
        residual: bool = True
        chunk: int = 32
        conv: int | None = 4
        gates: GatesConfig = TokenGates.Config()
        eps: float = 1e-6

        def check(self) -> None:
            super().check()
            if self.depth > 4:
                raise ValueError(f"NeuralMemory.depth is {self.depth}; memories have 1 to 4 layers")
            if self.act not in GELU:
                raise ValueError(f"NeuralMemory.act is {self.act!r}; choose one of {', '.join(GELU)}")

        def build(self, dim: int) -> NeuralMemory:
            return NeuralMemory(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg, self.heads = cfg, cfg.heads
        self.head_dim = d = head_width(cfg, cfg.heads, cfg.head_dim, dim)
        inner = self.heads * d
        self.q, self.k, self.v, self.gate = (Linear(dim, inner, bias=False) for _ in range(4))
        self.convs = nn.ModuleDict({name: ShortConv(inner, cfg.conv, bias=False) for name in "qkv" if cfg.conv})
        self.gates = cfg.gates.build(dim, cfg.heads)
        self.widths = (d, *[cfg.expansion * d] * (cfg.depth - 1), d)
        for n, (i, o) in enumerate(pairwise(self.widths)):
            self.register_parameter(f"start{n}", nn.Parameter(torch.empty(self.heads, i, o)))
        if cfg.residual:
            self.norm_weight, self.norm_bias = (nn.Parameter(torch.empty(self.heads, d)) for _ in range(2))
        self.norm = RMSNorm.Config(eps=cfg.eps).build(inner, groups=self.heads)
        self.out = Linear(inner, dim, bias=False)

    def reset_parameters(self) -> None:
        for w in self.start():
            nn.init.normal_(w, std=w.shape[1] ** -0.5)
        if self.cfg.residual:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)

    def start(self) -> Matrices:
        """M_0: the matrices [heads, in, out] that every text begins with."""
        return tuple(self.get_parameter(f"start{n}") for n in range(self.cfg.depth))

    def new_state(self, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> SlotState:
        return SlotState(**room(self.start(), slots, dtype, device), **self.held(slots, dtype, device))

    def held(self, slots: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """What is kept of each slot besides the memory, empty: tokens under convolutions, gates of an open chunk."""
        tensors = {name: conv.room(slots, dtype, device) for name, conv in self._convs()}
        if (shape := self.gates.held(slots)) is not None:
            tensors["gates"] = torch.zeros(shape, dtype=dtype, device=device)
        return tensors

    def _convs(self) -> Iterator[tuple[str, ShortConv]]:
        for name, conv in self.convs.items():
            assert isinstance(conv, ShortConv)
            yield f"conv_{name}", conv

    def mixing_flops(self, context: int) -> int:
        """FLOPs per token beyond the layer's own weights, however long the text: every matrix of M answers k and q,
        takes a gradient back (but the first), and is updated with its momentum and forgetting."""
        sizes = [i * o for i, o in pairwise(self.widths)]
        return self.heads * (2 * (4 * sum(sizes) - sizes[0]) + 4 * sum(sizes))

    def forward(self, x: Tensor, ctx: Ctx, state: SlotState | None = None, prefix: Tensor | None = None) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]. `prefix` [tokens, dim] is read before every text."""
        n = len(ctx.bounds.sequences)
        if state is None:
            return self.read(x, ctx.bounds, self.begin(n, prefix) if prefix is not None else None)[0]
        past = ctx.past or (0,) * n
        y, known = self.read(x, ctx.bounds, self.known(state, past, prefix), past)
        self.keep(state, known)
        return y

    def begin(self, sequences: int, prefix: Tensor | None = None) -> Known:
        """What is known before the first token; chunks are counted from there."""
        like = self.start()[0]
        if prefix is None:
            return Known(Memory.start(self.start(), sequences), self.held(sequences, like.dtype, like.device))
        _, (memory, held) = self.read(prefix[None], Bounds(1, len(prefix)))
        now, momentum = (tuple(w.expand(sequences, *w.shape[1:]) for w in part) for part in memory[1:])
        return Known(Memory(now, now, momentum), {k: t.expand(sequences, *t.shape[1:]) for k, t in held.items()})

    def known(self, state: SlotState, past: tuple[int, ...], prefix: Tensor | None = None) -> Known:
        """What a state knows of its slots, after `past` tokens."""
        held = {name: state.tensors[name] for name in state.tensors if name == "gates" or name.startswith("conv_")}
        if all(past):
            return Known(memory_of(state), held)
        start = self.begin(len(past), prefix)
        if not any(past):
            return start
        new = torch.tensor([n == 0 for n in past], device=start.memory.base[0].device)[:, None, None]
        held = {name: torch.where(new, start.held[name], t) for name, t in held.items()}
        return Known(merged(new[..., None], start.memory, memory_of(state)), held)

    def keep(self, state: SlotState, known: Known) -> None:
        """Put what is known into a state."""
        put(state, known.memory)
        state.tensors |= known.held

    def read(
        self, x: Tensor, bounds: Bounds, known: Known | None = None, before: tuple[int, ...] = ()
    ) -> tuple[Tensor, Known]:
        """Learn x [B, T, dim] and answer it, [B, T, dim]; and what is known then.

        Sequences go on from what is `known` after `before` tokens (default: a multiple of the chunk), or begin.
        """
        c, held = self.cfg, known.held if known is not None else {}
        forget, persist, rate, gates = self.gates(x, c.chunk, bounds, before, held.get("gates"))
        views = {name: self.view(name, x, bounds, held.get(f"conv_{name}")) for name in "qkv"}
        last = {f"conv_{name}": tail for name, (_, tail) in views.items() if tail is not None}
        q, k, v = (view for view, _ in views.values())
        y, memory = neural_memory(
            q, k, v, self.start(), forget, persist, rate, chunk=c.chunk, norm=self.normed(), act=c.act, bounds=bounds,
            initial=known.memory if known is not None else None,
            before=() if known is None else before or (0,) * len(bounds.sequences),
        )  # fmt: skip
        if gates is not None:
            last["gates"] = gates
        return self._answer(y, x), Known(memory, last)

    def view(
        self, name: str, x: Tensor, bounds: Bounds, initial: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Queries "q", keys "k" or values "v" [B, T, heads, d] of x [B, T, dim], and what their convolution keeps."""
        y, last = self.get_submodule(name)(x), None
        if name in self.convs:
            y, last = self.convs[name](y, bounds, initial, "silu")
        else:
            y = F.silu(y)
        y = y.unflatten(-1, (self.heads, self.head_dim))
        return (y if name == "v" else unit(y, self.cfg.eps)), last

    def ask(self, q: Tensor, x: Tensor, matrices: Matrices) -> Tensor:
        """Answer queries q [n, T, heads, d] of x [n, T, dim] from matrices [n, heads, in, out], and learn nothing."""
        norm = self.normed()
        work = torch.promote_types(x.dtype, matrices[0].dtype)
        net = Net(self.cfg.act, False, norm and Norm(norm.weight.to(work), norm.bias.to(work), norm.eps))
        rows = q.to(work).transpose(1, 2).flatten(0, 1)
        y = recall(net, tuple(w.to(work).flatten(0, 1) for w in matrices), rows)
        return self._answer(y.unflatten(0, (-1, self.heads)).transpose(1, 2).to(x.dtype), x)

    def normed(self) -> Norm | None:
        """The LayerNorm in M."""
        return Norm(self.norm_weight, self.norm_bias, self.cfg.eps) if self.cfg.residual else None

    def _answer(self, y: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.norm(y.flatten(-2)) * F.silu(self.gate(x)))
        return out


def unit(x: Tensor, eps: float) -> Tensor:
    """x / |x| over the last axis."""
    return rms_norm(x, None, eps / x.shape[-1]) * x.shape[-1] ** -0.5

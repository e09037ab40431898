"""Titans: the mixers against the paper's equations written out, as sequences, as states, in training; bad configs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from landmark.config import ModuleConfig, from_dict, to_dict
from landmark.ctx import Bounds, Ctx
from landmark.nn.attention import Attention
from landmark.nn.neural_memory import ChunkGates, NeuralMemory, TokenGates
from landmark.nn.persistent import PersistentAttention
from landmark.nn.rope import Rope
from landmark.nn.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from tests.models.families import perturb
from tests.nn.mixers import check_learns, check_sequences, check_state_is_constant

MEMORY = NeuralMemory.Config(heads=2, chunk=4)
FULL = Attention.Config(heads=2, kv_heads=1, head_dim=16, rope=Rope.Config())
WINDOW = Attention.Config(heads=2, kv_heads=1, head_dim=16, rope=Rope.Config(), window=6)
PERSISTENT = PersistentAttention.Config(heads=2, kv_heads=1, head_dim=16, rope=Rope.Config(), window=6, tokens=3)

MIXERS: dict[str, ModuleConfig] = {
    "memory": MEMORY,
    "matrix": NeuralMemory.Config(heads=2, depth=1, chunk=4, residual=False, conv=None),
    "deep, gates of chunks": NeuralMemory.Config(heads=1, depth=4, expansion=2, chunk=5, gates=ChunkGates.Config()),
    "persistent": PERSISTENT,
    "gate": MemoryAsGate.Config(attention=WINDOW, memory=MEMORY),
    "gate, persistent": MemoryAsGate.Config(attention=PERSISTENT, memory=MEMORY),
    "layer": MemoryAsLayer.Config(attention=WINDOW, memory=MEMORY),
    "layer, persistent": MemoryAsLayer.Config(attention=PERSISTENT, memory=MEMORY),
    "context": MemoryAsContext.Config(attention=FULL, memory=MEMORY, segment=8, persistent=3),
    "context, gates of chunks": MemoryAsContext.Config(
        attention=FULL, memory=NeuralMemory.Config(heads=1, depth=1, chunk=4, gates=ChunkGates.Config()), segment=4,
        persistent=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_sequences(mixer: ModuleConfig) -> None:
    check_sequences(mixer)


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_the_state_does_not_grow(mixer: ModuleConfig) -> None:
    check_state_is_constant(mixer)


LONGER = replace(PERSISTENT, window=16)
TRAINED = {
    "memory": replace(MEMORY, chunk=8),
    "matrix": NeuralMemory.Config(heads=2, depth=1, chunk=8, residual=False),
    "gate": MemoryAsGate.Config(attention=LONGER, memory=replace(MEMORY, chunk=8)),
    "layer": MemoryAsLayer.Config(attention=LONGER, memory=replace(MEMORY, chunk=8)),
    "context": MemoryAsContext.Config(attention=FULL, memory=replace(MEMORY, chunk=8), segment=16, persistent=3),
}


@pytest.mark.parametrize("name", TRAINED)
def test_it_learns_and_is_kept(name: str, tmp_path: Path) -> None:
    check_learns(TRAINED[name], tmp_path, steps=130 if name in ("gate", "context") else 60)


def built(config: ModuleConfig, dim: int) -> torch.nn.Module:
    torch.manual_seed(0)
    module = config.build(dim)
    for part in module.modules():
        if reset := getattr(part, "reset_parameters", None):
            reset()
    perturb(module)
    return module.double()


def plain(rows: int, width: int) -> Ctx:
    bounds = Bounds(rows, width)
    return Ctx(bounds.offsets(), bounds)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query [H, d] over the keys [n, H, d] that it may see."""
    scores = torch.einsum("hd,nhd->hn", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), v).flatten()


@pytest.mark.parametrize("length", [5, 6, 17])
def test_persistent_attention_written_out(length: int) -> None:
    config = PersistentAttention.Config(heads=2, kv_heads=2, head_dim=4, window=6, tokens=3)
    layer = built(config, 8)
    x = torch.randn(1, length, 8, dtype=torch.float64)
    q, k, v = (f(x)[0].unflatten(-1, (2, 4)) for f in (layer.q, layer.k, layer.v))
    pk, pv = (f(layer.persistent).unflatten(-1, (2, 4)) for f in (layer.k, layer.v))
    want = []
    for t in range(length):
        seen = slice(max(0, t - 5), t + 1)
        want.append(layer.out(softmax_attention(q[t], torch.cat([pk, k[seen]]), torch.cat([pv, v[seen]]))))
    torch.testing.assert_close(layer(x, plain(1, length))[0], torch.stack(want))


class SlowMemory:
    """The neural memory of a matrix for one text, eq. 8 - 15 with chunks of one token; no norm, no code of ours."""

    def __init__(self, layer: NeuralMemory) -> None:
        self.layer, self.heads = layer, layer.heads
        self.m = [w.detach().clone() for w in layer.start()[0]]
        self.s = [torch.zeros_like(w) for w in self.m]

    def unit(self, x: Tensor) -> Tensor:
        y = F.silu(x).unflatten(-1, (self.heads, -1))
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        normed = torch.stack([h * torch.rsqrt(h.square().mean() + 1e-6) for h in y]).flatten() * self.layer.norm.weight
        return self.layer.out(normed * F.silu(self.layer.gate(x)))

    def ask(self, x: Tensor, m: list[Tensor]) -> Tensor:
        q = self.unit(self.layer.q(x))
        return self.finish(torch.stack([q[h] @ m[h] for h in range(self.heads)]), x)

    def read(self, x: Tensor) -> Tensor:
        layer = self.layer
        k, v = self.unit(layer.k(x)), F.silu(layer.v(x)).unflatten(-1, (self.heads, -1))
        gates = (layer.gates.project(x).unflatten(-1, (3, self.heads)) + layer.gates.bias).sigmoid()
        for h in range(self.heads):
            m = self.m[h].clone().requires_grad_()
            (surprise,) = torch.autograd.grad((k[h] @ m - v[h]).square().sum(), m)
            self.s[h] = gates[1, h] * self.s[h] - gates[2, h] * layer.gates.cfg.rate * surprise
            self.m[h] = (1 - gates[0, h]) * self.m[h] + self.s[h]
        return self.ask(x, self.m)


def matrix(heads: int = 2) -> NeuralMemory.Config:
    gates = TokenGates.Config(forget=-2.0, rate=0.3)
    return NeuralMemory.Config(heads=heads, depth=1, residual=False, chunk=1, conv=None, gates=gates)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean() + 1e-6) * weight


def gated(layer: MemoryAsGate | MemoryAsContext, y: Tensor, m: Tensor) -> Tensor:
    return layer.out(rms(y, layer.gate.attention.weight) * F.silu(rms(m, layer.gate.memory.weight)))


def test_the_memory_written_out() -> None:
    layer = built(matrix(), 8)
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    slow = SlowMemory(layer)
    want = torch.stack([slow.read(x[0, t]) for t in range(7)])
    torch.testing.assert_close(layer(x, plain(1, 7))[0], want)


def test_memory_as_gate_written_out() -> None:
    """Eq. 26 - 28: the memory reads the persistent tokens before the text, attention sees them from everywhere."""
    attention = PersistentAttention.Config(heads=2, kv_heads=2, head_dim=4, window=3, tokens=2)
    layer = built(MemoryAsGate.Config(attention=attention, memory=matrix()), 8)
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    memory = SlowMemory(layer.memory)
    for p in layer.attention.persistent:
        memory.read(p)
    y = layer.attention(x, plain(1, 7))[0]
    want = torch.stack([gated(layer, y[t], memory.read(x[0, t])) for t in range(7)])
    torch.testing.assert_close(layer(x, plain(1, 7))[0], want)


@pytest.mark.parametrize("length", [3, 8, 11])
def test_memory_as_context_written_out(length: int) -> None:
    """Eq. 21 - 25, a token at a time."""
    attention = Attention.Config(heads=2, kv_heads=2, head_dim=4)
    layer = built(MemoryAsContext.Config(attention=attention, memory=matrix(), segment=4, persistent=2), 8)
    x = torch.randn(1, length, 8, dtype=torch.float64)
    a, memory = layer.attention, SlowMemory(layer.memory)

    def heads(f: torch.nn.Module, x: Tensor) -> Tensor:
        return f(x).unflatten(-1, (2, 4))

    want = []
    for start in range(0, length, 4):
        before = [w.clone() for w in memory.m]
        seen = list(layer.persistent)
        for t in range(start, min(start + 4, length)):
            h = rms(memory.ask(x[0, t], before), layer.norm_h.weight)
            seen += [h, x[0, t]]  # h_t and token t; without rope the order is free
            context = torch.stack(seen)
            y = a.out(softmax_attention(heads(a.q, x[0, t]), heads(a.k, context), heads(a.v, context)))
            y = rms(y, layer.norm_y.weight)
            want.append(gated(layer, y, memory.read(y)))
    torch.testing.assert_close(layer(x, plain(1, length))[0], torch.stack(want))


def test_gates_of_chunks_are_those_of_their_first_tokens() -> None:
    gates = ChunkGates.Config().build(8, 2)
    gates.reset_parameters()
    per_token = TokenGates.Config().build(8, 2)
    per_token.load_state_dict(gates.state_dict())
    bounds = Bounds.of_lengths((7, 4))
    x = torch.randn(1, 11, 8)
    first = torch.tensor([0, 0, 0, 3, 3, 3, 6, 7, 7, 7, 10])
    for got, want in zip(gates(x, 3, bounds, (), None)[:3], per_token(x, 3, bounds, (), None)[:3], strict=True):
        torch.testing.assert_close(got, want[:, first])


def test_the_memory_recalls_what_left_the_window() -> None:
    """An association that was read once is answered long after, and is forgotten where forgetting is on."""
    torch.manual_seed(0)
    answers = {}
    for forget in (-20.0, 0.0):
        gates = TokenGates.Config(forget=forget, persist=-20.0, learn=20.0, rate=0.5)
        layer = NeuralMemory.Config(heads=1, depth=1, residual=False, chunk=1, conv=None, gates=gates).build(64)
        layer.gates.reset_parameters()
        torch.nn.init.zeros_(layer.gates.project.weight)
        torch.nn.init.zeros_(layer.start0)
        x = torch.randn(1, 12, 64)
        _, (memory, _) = layer.read(x, Bounds(1, 12))
        k = F.normalize(F.silu(layer.k(x[0, 0])), dim=-1)
        v = F.silu(layer.v(x[0, 0]))
        answers[forget] = (
            F.cosine_similarity(k @ memory.now[0][0, 0], v, dim=0).item(),
            (k @ memory.now[0][0, 0]).norm(),
        )
    assert answers[-20.0][0] > 0.6
    assert answers[0.0][1] < 0.3 * answers[-20.0][1]


def test_configs_as_data() -> None:
    for mixer in MIXERS.values():
        assert from_dict(to_dict(mixer)) == mixer


def test_what_configs_refuse() -> None:
    for depth in (0, 5):
        with pytest.raises(ValueError, match=rf"NeuralMemory\.depth is {depth}"):
            NeuralMemory.Config(heads=2, depth=depth)
    with pytest.raises(ValueError, match=r"NeuralMemory\.chunk is 0"):
        NeuralMemory.Config(heads=2, chunk=0)
    with pytest.raises(ValueError, match=r"NeuralMemory\.heads is 3, which does not divide the width 32"):
        NeuralMemory.Config(heads=3).build(32)
    with pytest.raises(ValueError, match=r"NeuralMemory\.act is 'relu'; choose one of gelu, gelu_tanh"):
        NeuralMemory.Config(heads=2, act="relu")
    with pytest.raises(ValueError, match=r"TokenGates\.rate is 0"):
        TokenGates.Config(rate=0.0)
    with pytest.raises(ValueError, match=r"MemoryAsContext\.segment is 0"):
        MemoryAsContext.Config(attention=FULL, memory=MEMORY, segment=0)
    with pytest.raises(ValueError, match=r"MemoryAsContext\.segment is 6, no multiple of memory\.chunk 4"):
        MemoryAsContext.Config(attention=FULL, memory=MEMORY, segment=6)
    with pytest.raises(ValueError, match=r"MemoryAsContext\.attention is .*window=6"):
        MemoryAsContext.Config(attention=WINDOW, memory=MEMORY, segment=8)
    for cls in (MemoryAsGate, MemoryAsLayer):
        with pytest.raises(ValueError, match=rf"{cls.__name__}\.attention is .*take PersistentAttention"):
            cls.Config(attention=FULL, memory=MEMORY)
    with pytest.raises(ValueError, match=r"PersistentAttention\.kv_heads is 2, which does not divide heads 3"):
        PersistentAttention.Config(heads=3, kv_heads=2, head_dim=4, window=4, tokens=1)

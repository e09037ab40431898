"""Small networks whose weights are the state of a sequence, trained as the sequence is read.

What TTT layers (Sun et al. 2024) and the neural memory of Titans (Behrouz et al. 2025) have in common: a memory f, an
MLP for every sequence and head, learns to map k to v by gradient descent on |f(k) - v|^2 / 2, and answers q with f(q).
Within a chunk all gradients are taken at the weights `base` that the chunk began with. A token's gradient with respect
to the matrix W of a layer is the outer product of the layer's input x and the loss's gradient g at its output, and the
weights after token t are

    W_t = keep_t W + push_t S - sum_(i <= t) reach_(t, i) x_i^T g_i

with a momentum S. So an input h meets them as keep_t h W + push_t h S - (reach * h x^T) g: matrix products only, and
no token's own weights ever exist (the dual form: Sun et al., sec. 2.5; Behrouz et al., sec. 3.2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..chunks import Chunks
from .pieces import GELU, Act, gelu, gelu_slopes, loss_gradient
from .scan import Plan, scan, with_ones

Matrices = tuple[Tensor, ...]  # one a layer


class Norm(NamedTuple):
    """f(x) = x + LayerNorm(MLP(x)) with weight and bias [heads, d]; without it f is the MLP itself."""

    weight: Tensor
    bias: Tensor
    eps: float


class Net(NamedTuple):
    """The shape of a memory: matrices [in, out], or [in + 1, out] with `bias` as their last row."""

    act: Act = "gelu_tanh"
    bias: bool = False
    norm: Norm | None = None


class Memory(NamedTuple):
    """What is known of every sequence: matrices [sequences, heads, in, out].

    `base`: where gradients are taken, the weights with which the open chunk began; `now`: the weights that go on into
    the next token; `momentum`: what moves them on.
    """

    base: Matrices
    now: Matrices
    momentum: Matrices

    @classmethod
    def start(cls, matrices: Matrices, sequences: int) -> Memory:
        """That of sequences which have not begun, from the matrices [heads, in, out] that all of them begin with."""
        base = tuple(w.expand(sequences, *w.shape) for w in matrices)
        return cls(base, base, tuple(torch.zeros_like(w) for w in base))

    def to(self, dtype: torch.dtype) -> Memory:
        """The same in another precision."""
        return Memory(*(tuple(w.to(dtype) for w in part) for part in self))


class Steps(NamedTuple):
    """What the tokens of a chunk do to its weights; N = chunks * heads.

    Five of them say the same of the chunk's end: now = end_keep now + end_push S - (take * x)^T g, and
    S = carry S - (store * x)^T g. `keep` and `end_keep` None stand for ones. Unless momentum is `lasting`, it is zero
    after every chunk that is complete.
    """

    reach: Tensor  # [N, size, size]
    keep: Tensor | None  # [N, size, 1]
    push: Tensor  # [N, size, 1]
    end_keep: Tensor | None  # [N, 1, 1]
    end_push: Tensor  # [N, 1, 1]
    take: Tensor  # [N, size, 1]
    carry: Tensor  # [N, 1, 1]
    store: Tensor  # [N, size, 1]
    lasting: bool


def learn(
    net: Net, q: Tensor, k: Tensor, v: Tensor, initial: Memory | Matrices, steps: Steps, chunks: Chunks
) -> tuple[Tensor, Memory]:  # fmt: skip
    """Answers [B, T, heads, d] to q [B, T, heads, d] while k and v are learned, and what is known in the end.

    `initial`: where the sequences go on, or the matrices [heads, in, out] that all of them begin with.
    """
    heads, size, steps_of = q.shape[2], chunks.size, chunks.steps
    queries, keys, values = (by_head(chunks.cut(x)) for x in (q, k, v))
    goal, gain = loss_terms(net.norm, keys, values)
    counts = tuple((step.stop - step.start) * heads for step in steps_of)
    if not counts:
        return torch.zeros_like(q), _finish(initial, (), chunks, heads)
    complete = []
    for step, going in zip(steps_of, (*counts[1:], 0), strict=True):
        last = chunks.last[step][going // heads :] == size - 1
        complete.append(None if last.all() else last.to(q.device).repeat_interleave(heads)[:, None, None])
    begun = isinstance(initial, Memory)
    plan = Plan(
        counts, tuple(complete), len(initial.now if isinstance(initial, Memory) else initial), net.act, net.bias,
        net.norm.eps if net.norm is not None else 0.0, steps.lasting, begun,
    )  # fmt: skip
    o, ends = scan(
        plan, with_ones(keys, net.bias), with_ones(queries, net.bias), goal,
        gain[: counts[0]] if gain is not None else None, *steps[:-1], *_begin(initial, chunks, heads, counts[0]),
    )  # fmt: skip
    answers = answer(net.norm, queries, o)
    y = chunks.join(answers.unflatten(0, (-1, heads)).transpose(1, 2))
    return y, _finish(initial, ends, chunks, heads)


def surprise(
    net: Net, base: Matrices, x: Tensor, goal: Tensor, gain: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Inputs x_l and gradients g_l of the loss at the outputs of every layer, for keys x [N, n, in] at `base`."""
    inputs, slopes = [x], []
    z = torch.bmm(x, base[0])
    for w in base[1:]:
        y, slope, _ = gelu_slopes(z, net.act, False)
        slopes.append(slope)
        inputs.append(with_ones(y, net.bias))
        z = torch.bmm(inputs[-1], w)
    grads = [loss_gradient(z, goal, gain, net.norm.eps if net.norm is not None else 0.0).g]
    for w, slope in zip(base[:0:-1], slopes[::-1], strict=True):
        grads.insert(0, torch.bmm(grads[0], w.mT)[..., : slope.shape[2]] * slope)
    return inputs, grads


def loss_terms(norm: Norm | None, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the loss's gradient needs besides the MLP's output z, [N, n, d]: `goal`, and `gain` [N, 1, d].

    The gradient is z - goal without a norm (goal = v). With one, y = k + weight z^ + bias for the normalised z^, so it
    is weight (y - v) = gain z^ + goal at z^.
    """
    if norm is None:
        return values, None
    weight, bias = per_row(norm.weight, keys), per_row(norm.bias, keys)
    return weight * (bias + keys - values), weight.square()


def answer(norm: Norm | None, q: Tensor, z: Tensor) -> Tensor:
    """f(q) from the MLP's output z [N, n, d]."""
    if norm is None:
        return z
    hat = F.layer_norm(z, z.shape[-1:], eps=norm.eps)
    return q + torch.addcmul(per_row(norm.bias, q), per_row(norm.weight, q), hat)


def recall(net: Net, matrices: Matrices, q: Tensor) -> Tensor:
    """f(q) of queries [N, n, d] by weights [N, in, out], which learn nothing from it."""
    z = torch.bmm(with_ones(q, net.bias), matrices[0])
    for w in matrices[1:]:
        z = torch.bmm(with_ones(gelu(z, net.act), net.bias), w)
    return answer(net.norm, q, z)


def by_head(x: Tensor) -> Tensor:
    """[chunks, size, heads, ...] -> [chunks * heads, size, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def per_row(x: Tensor, like: Tensor) -> Tensor:
    """[heads, d] -> [N, 1, d] for the N = chunks * heads rows of `like`."""
    return x.expand(len(like) // len(x), *x.shape).reshape(-1, 1, x.shape[-1])


def _begin(initial: Memory | Matrices, chunks: Chunks, heads: int, count: int) -> tuple[Tensor | None, ...]:
    """Base, weights and momentum of the sequences with tokens, in the order of the chunks: [count, in, out] each."""
    n = count // heads
    if not isinstance(initial, Memory):
        nothing = (None,) * len(initial)
        return (*nothing, *(w.expand(n, *w.shape).flatten(0, 1) for w in initial), *nothing)
    order = chunks.order[:n].to(initial.now[0].device)
    return tuple(w[order].flatten(0, 1) for part in initial for w in part)


def _finish(initial: Memory | Matrices, ends: tuple[Matrices, ...], chunks: Chunks, heads: int) -> Memory:
    """What is known in the end, in the order of the bounds. A sequence without tokens knows what it knew."""
    n = len(chunks.bounds.sequences)
    busy = chunks.steps[0].stop if chunks.steps else 0
    parts = [tuple(w.unflatten(0, (-1, heads)) for w in part) for part in ends]
    if busy < n:
        before = initial if isinstance(initial, Memory) else Memory.start(initial, n)
        order = chunks.order[busy:].to(before.now[0].device)
        idle = [tuple(w[order] for w in part) for part in before]
        parts = [tuple(map(torch.cat, zip(*both, strict=True))) for both in zip(parts, idle, strict=True)] or idle
    if n == 1:
        return Memory(*parts)
    place = chunks.place.to(parts[0][0].device)
    return Memory(*(tuple(w[place] for w in part) for part in parts))


__all__ = [
    "GELU", "Act", "Matrices", "Memory", "Net", "Norm", "Steps", "answer", "by_head", "gelu", "learn", "loss_terms",
    "recall", "surprise", "with_ones",
]  # fmt: skip

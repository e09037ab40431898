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

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunks import Chunks

Act = Literal["gelu", "gelu_tanh"]
GELU: dict[Act, str] = {"gelu": "none", "gelu_tanh": "tanh"}
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

    def split(self, counts: list[int]) -> list[Steps]:
        """Those of the first of the N, of the next ones ..."""
        parts = [x.split(counts) if isinstance(x, Tensor) else [x] * len(counts) for x in self]
        return [Steps(*part) for part in zip(*parts, strict=True)]


def learn(
    net: Net, q: Tensor, k: Tensor, v: Tensor, initial: Memory | Matrices, steps: Steps, chunks: Chunks
) -> tuple[Tensor, Memory]:  # fmt: skip
    """Answers [B, T, heads, d] to q [B, T, heads, d] while k and v are learned, and what is known in the end.

    `initial`: where the sequences go on, or the matrices [heads, in, out] that all of them begin with.
    """
    heads, size = q.shape[2], chunks.size
    queries, keys, values = (by_head(chunks.cut(x)) for x in (q, k, v))
    x, h = with_ones(keys, net.bias), with_ones(queries, net.bias)
    goal, gain = loss_terms(net.norm, keys, values)
    counts = [(step.stop - step.start) * heads for step in chunks.steps]
    parts = (y.split(counts) for y in (x, h, goal, steps.reach * torch.bmm(h, x.mT)))
    base, now, momentum = _begin(initial, chunks, heads)
    outs: list[Tensor] = []
    ends: list[Memory] = []
    for number, (xs_, o, goal_, first_reach, here) in enumerate(zip(*parts, steps.split(counts), strict=True)):
        count = counts[number]
        base, now, momentum = (first_rows(part, count) for part in (base, now, momentum))
        inputs, grads = surprise(net, base, xs_, goal_, gain[:count] if gain is not None else None)
        for layer, (w, xs, g) in enumerate(zip(now, inputs, grads, strict=True)):
            if layer:
                o = with_ones(gelu(o, net.act), net.bias)
            reach = here.reach * torch.bmm(o, xs.mT) if layer else first_reach
            y = torch.bmm(o, w)
            if here.keep is not None:
                y = y * here.keep
            if momentum:
                y = torch.addcmul(y, torch.bmm(o, momentum[layer]), here.push)
            o = torch.baddbmm(y, reach, g, alpha=-1)
        outs.append(o)
        going = counts[number + 1] if number + 1 < len(counts) else 0
        after = _moved(now, momentum, here.end_keep, here.end_push, here.take, inputs, grads)
        carried: Matrices = ()
        if steps.lasting or going < count:
            carried = _moved(momentum, (), here.carry, None, here.store, inputs, grads)
        if going < count:
            complete = chunks.last[chunks.steps[number]][going // heads :] == size - 1
            mask = complete.to(q.device).repeat_interleave(heads)[:, None, None]
            left = tuple(torch.where(mask, a[going:], b[going:]) for a, b in zip(after, base, strict=True))
            ends.append(Memory(left, *(tuple(w[going:] for w in part) for part in (after, carried))))
        base, now, momentum = after, after, carried if steps.lasting else ()
    answers = answer(net.norm, queries, torch.cat(outs)) if outs else queries
    y = chunks.join(answers.unflatten(0, (-1, heads)).transpose(1, 2))
    return y, _finish(initial, ends, chunks, heads)


def surprise(
    net: Net, base: Matrices, x: Tensor, goal: Tensor, gain: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Inputs x_l and gradients g_l of the loss at the outputs of every layer, for keys x [N, n, in] at `base`."""
    inputs, hidden = [x], []
    z = torch.bmm(x, base[0])
    for w in base[1:]:
        hidden.append(z)
        inputs.append(with_ones(gelu(z, net.act), net.bias))
        z = torch.bmm(inputs[-1], w)
    grads = [_loss_gradient(net.norm, z, goal, gain)]
    for w, z in zip(base[:0:-1], hidden[::-1], strict=True):
        back = torch.bmm(grads[0], w.mT)[..., : z.shape[2]]
        grads.insert(0, torch.ops.aten.gelu_backward(back, z, approximate=GELU[net.act]))
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


def _loss_gradient(norm: Norm | None, z: Tensor, goal: Tensor, gain: Tensor | None) -> Tensor:
    """The gradient of the loss with respect to the MLP's output z."""
    if norm is None:
        return z - goal
    assert gain is not None
    hat, mean, deviation = torch.native_layer_norm(z, z.shape[-1:], None, None, norm.eps)
    at_hat = torch.addcmul(goal, gain, hat)
    wanted = [True, False, False]
    out: Tensor = torch.ops.aten.native_layer_norm_backward(
        at_hat, z, z.shape[-1:], mean, deviation, None, None, wanted
    )[0]
    return out


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


def gelu(x: Tensor, act: Act) -> Tensor:
    return F.gelu(x, approximate=GELU[act])


def with_ones(x: Tensor, bias: bool) -> Tensor:
    """x with a constant input, whose weights are the biases."""
    return F.pad(x, (0, 1), value=1.0) if bias else x


def by_head(x: Tensor) -> Tensor:
    """[chunks, size, heads, ...] -> [chunks * heads, size, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def per_row(x: Tensor, like: Tensor) -> Tensor:
    """[heads, d] -> [N, 1, d] for the N = chunks * heads rows of `like`."""
    return x.expand(len(like) // len(x), *x.shape).reshape(-1, 1, x.shape[-1])


def first_rows(matrices: Matrices, count: int) -> Matrices:
    """Those of the first rows; a slice that takes all would cost the backward pass a copy."""
    return tuple(w[:count] for w in matrices) if matrices and len(matrices[0]) > count else matrices


def _moved(
    start: Matrices, push: Matrices, keep: Tensor | None, pushed: Tensor | None, share: Tensor,
    inputs: list[Tensor], grads: list[Tensor],
) -> Matrices:  # fmt: skip
    """keep start + pushed push - (share * x)^T g; nothing stands for zeros, a `keep` of None for ones."""
    out = []
    for layer, (x, g) in enumerate(zip(inputs, grads, strict=True)):
        steps = (x * share).mT
        if not start:
            out.append(-torch.bmm(steps, g))
            continue
        w = start[layer] if keep is None else start[layer] * keep
        if push and pushed is not None:
            w = torch.addcmul(w, push[layer], pushed)
        out.append(torch.baddbmm(w, steps, g, alpha=-1))
    return tuple(out)


def _begin(initial: Memory | Matrices, chunks: Chunks, heads: int) -> tuple[Matrices, Matrices, Matrices]:
    """Base, weights and momentum in the order of the chunks, [sequences * heads, in, out]; no momentum: zeros."""
    if not isinstance(initial, Memory):
        n = len(chunks.bounds.sequences)
        base = tuple(w.expand(n, *w.shape).flatten(0, 1) for w in initial)
        return base, base, ()
    order = chunks.order.to(initial.now[0].device)
    base, now, momentum = (tuple(w[order].flatten(0, 1) for w in part) for part in initial)
    return base, now, momentum


def _finish(initial: Memory | Matrices, ends: list[Memory], chunks: Chunks, heads: int) -> Memory:
    """What is known in the end, in the order of the bounds. A sequence without tokens knows what it knew."""
    n = len(chunks.bounds.sequences)
    idle = n - (chunks.steps[0].stop if chunks.steps else 0)
    if idle:
        before = initial if isinstance(initial, Memory) else Memory.start(initial, n)
        order = chunks.order[n - idle :].to(before.now[0].device)
        ends.insert(0, Memory(*(tuple(w[order].flatten(0, 1) for w in part) for part in before)))
    place = chunks.place.to(ends[0].now[0].device)
    base, now, momentum = (
        tuple(torch.cat(pieces[::-1]).unflatten(0, (-1, heads))[place] for pieces in zip(*parts, strict=True))
        for parts in zip(*ends, strict=True)
    )
    return Memory(base, now, momentum)

"""The primal form, as the paper's equations have it: the weights of every token are made, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ctx import Bounds
from ..fast_weights import Matrices, Memory, Net


def primal(
    net: Net, q: Tensor, k: Tensor, v: Tensor, weights: Matrices, rate: Tensor, scale: Tensor,
    bounds: Bounds, initial: Memory | None, before: tuple[int, ...],
) -> tuple[Tensor, Memory]:  # fmt: skip
    """Arguments as in `ttt`. Gradients of the inner loss are taken by autograd, one token and head at a time."""
    b = len(scale)
    y = torch.zeros_like(q).flatten(0, 1)
    q, k, v, rate = (x.flatten(0, 1) for x in (q, k, v, rate))
    finals = []
    for i, (start, length) in enumerate(bounds.sequences):
        done = []
        for head in range(q.shape[1]):
            if initial is None:
                base, total = [w[head] for w in weights], [torch.zeros_like(w[head]) for w in weights]
            else:
                base, total = [w[i, head] for w in initial.base], [-s[i, head] for s in initial.momentum]
            place = before[i] % b if initial is not None else 0
            for t in range(start, start + length):
                grads = gradient(net, base, head, k[t, head], v[t, head])
                total = [s + rate[t, head] * g for s, g in zip(total, grads, strict=True)]
                now = [w - scale[place] * s for w, s in zip(base, total, strict=True)]
                y = y.index_put((torch.tensor(t), torch.tensor(head)), model(net, now, head, q[t, head]))
                place += 1
                if place == b:
                    base, total, place = now, [torch.zeros_like(w) for w in now], 0
            done.append([*base, *(-s for s in total)])
        finals.append([torch.stack(parts) for parts in zip(*done, strict=True)])
    state = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    base_all, momentum = state[: len(weights)], state[len(weights) :]
    return y.view_as(q).unflatten(0, (bounds.rows, bounds.width)), Memory(base_all, base_all, momentum)


def model(net: Net, weights: list[Tensor], head: int, x: Tensor) -> Tensor:
    """f(x; W) of one head, x [d]."""
    z = x
    for layer, w in enumerate(weights):
        if layer:
            z = F.gelu(z, approximate="tanh" if net.act == "gelu_tanh" else "none")
        z = z @ w[:-1] + w[-1] if net.bias else z @ w
    if net.norm is None:
        return z
    return x + F.layer_norm(z, z.shape, net.norm.weight[head], net.norm.bias[head], net.norm.eps)


def gradient(net: Net, weights: list[Tensor], head: int, k: Tensor, v: Tensor) -> list[Tensor]:
    """The gradient of |f(k; W) - v|^2 / 2 with respect to W."""

    def loss(weights: list[Tensor]) -> Tensor:
        return (model(net, weights, head, k) - v).square().sum() / 2

    grads: list[Tensor] = torch.func.grad(loss)(weights)
    return grads

"""The paper's equations, token by token: every memory M_t exists, and autograd takes its surprise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ctx import Bounds
from ..fast_weights import Matrices, Memory, Net


def slow(
    net: Net, q: Tensor, k: Tensor, v: Tensor, weights: Matrices, forget: Tensor, persist: Tensor, rate: Tensor,
    chunk: int, bounds: Bounds, initial: Memory | None, before: tuple[int, ...],
) -> tuple[Tensor, Memory]:  # fmt: skip
    """Arguments as in `neural_memory`."""
    y = torch.zeros_like(q).flatten(0, 1)
    q, k, v, forget, persist, rate = (x.flatten(0, 1) for x in (q, k, v, forget, persist, rate))
    state = initial or Memory.start(weights, len(bounds.sequences))
    finals = []
    for i, (start, length) in enumerate(bounds.sequences):
        ends = []
        for head in range(q.shape[1]):
            base, now, momentum = ([w[i, head] for w in part] for part in state)
            for t in range(start, start + length):
                if ((before[i] if initial is not None else 0) + t - start) % chunk == 0:
                    base = now
                surprise = gradient(net, base, head, k[t, head], v[t, head])
                momentum = [
                    persist[t, head] * s - rate[t, head] * g for s, g in zip(momentum, surprise, strict=True)
                ]  # eq. 14
                now = [(1 - forget[t, head]) * m + s for m, s in zip(now, momentum, strict=True)]  # eq. 13
                y = y.index_put((torch.tensor(t), torch.tensor(head)), memory(net, now, head, q[t, head]))  # eq. 15
            if ((before[i] if initial is not None else 0) + length) % chunk == 0:
                base = now
            ends.append([*base, *now, *momentum])
        finals.append([torch.stack(parts) for parts in zip(*ends, strict=True)])
    parts = [torch.stack(part) for part in zip(*finals, strict=True)]
    n = len(weights)
    final = Memory(tuple(parts[:n]), tuple(parts[n : 2 * n]), tuple(parts[2 * n :]))
    return y.view_as(q).unflatten(0, (bounds.rows, bounds.width)), final


def memory(net: Net, weights: list[Tensor], head: int, x: Tensor) -> Tensor:
    """M(x) of one head, x [d]."""
    z = x @ weights[0]
    for w in weights[1:]:
        z = F.gelu(z, approximate="tanh" if net.act == "gelu_tanh" else "none") @ w
    if net.norm is None:
        return z
    return x + F.layer_norm(z, z.shape, net.norm.weight[head], net.norm.bias[head], net.norm.eps)


def gradient(net: Net, weights: list[Tensor], head: int, k: Tensor, v: Tensor) -> list[Tensor]:
    """The gradient of |M(k) - v|^2 with respect to M (eq. 12)."""

    def loss(weights: list[Tensor]) -> Tensor:
        return (memory(net, weights, head, k) - v).square().sum()

    grads: list[Tensor] = torch.func.grad(loss)(weights)
    return grads

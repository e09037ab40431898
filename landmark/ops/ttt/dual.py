"""The dual form (sec. 2.5): a mini-batch at a time, in matrix products; and a single token, for decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ctx import Bounds
from ..chunks import Chunks
from ..fast_weights import (
    Matrices,
    Memory,
    Net,
    Steps,
    answer,
    by_head,
    gelu,
    learn,
    loss_terms,
    surprise,
    with_ones,
)


def dual(
    net: Net, q: Tensor, k: Tensor, v: Tensor, weights: Matrices, rate: Tensor, scale: Tensor,
    bounds: Bounds, initial: Memory | None, before: tuple[int, ...],
) -> tuple[Tensor, Memory]:  # fmt: skip
    """Arguments as in `ttt`."""
    size, heads = len(scale), q.shape[2]
    chunks = Chunks.of(bounds, size, before if initial is not None else ())
    rates = by_head(chunks.cut(rate))[..., None]  # [N, size, 1], zeros where there is no token
    complete = (chunks.last == size - 1).to(rates).repeat_interleave(heads)[:, None, None]
    steps = Steps(
        reach=(scale[:, None] * rates.mT).tril(),
        keep=None,
        push=scale[:, None].expand_as(rates),
        end_keep=None,
        end_push=complete * scale[-1],
        take=rates * (complete * scale[-1]),
        carry=1 - complete,
        store=rates * (1 - complete),
        lasting=False,
    )
    return learn(net, q, k, v, weights if initial is None else initial, steps, chunks)


def step(
    net: Net, q: Tensor, k: Tensor, v: Tensor, weights: Matrices, rate: Tensor, scale: Tensor,
    bounds: Bounds, initial: Memory | None, before: tuple[int, ...],
) -> tuple[Tensor, Memory]:  # fmt: skip
    """One new token for every sequence of a state; arguments as in `ttt`."""
    assert initial is not None
    slots, _, heads, d = q.shape
    places = [n % len(scale) for n in before]
    here = scale[places].repeat_interleave(heads)[:, None, None]
    queries, keys, values = (x.reshape(slots * heads, 1, d) for x in (q, k, v))
    base, momentum = (tuple(w.flatten(0, 1) for w in part) for part in (initial.base, initial.momentum))
    inputs, grads = surprise(net, base, with_ones(keys, net.bias), *loss_terms(net.norm, keys, values))
    rates = rate.reshape(slots * heads, 1, 1)
    momentum = tuple(
        torch.baddbmm(s, (x * rates).mT, g, alpha=-1) for s, x, g in zip(momentum, inputs, grads, strict=True)
    )
    z = queries
    for layer, (w, s) in enumerate(zip(base, momentum, strict=True)):
        a = with_ones(gelu(z, net.act) if layer else z, net.bias)
        z = torch.addcmul(torch.bmm(a, w), torch.bmm(a, s), here)
    complete = [place == len(scale) - 1 for place in places]
    if any(complete):
        done = torch.tensor(complete, device=q.device).repeat_interleave(heads)[:, None, None]
        base = tuple(torch.where(done, w + scale[-1] * s, w) for w, s in zip(base, momentum, strict=True))
        momentum = tuple(s.masked_fill(done, 0) for s in momentum)
    base, momentum = (tuple(w.unflatten(0, (slots, heads)) for w in part) for part in (base, momentum))
    return answer(net.norm, queries, z).view_as(q), Memory(base, base, momentum)

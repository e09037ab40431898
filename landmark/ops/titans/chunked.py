"""The memory a chunk at a time, in matrix products (sec. 3.2); and a single token, for decoding.

Within a chunk both recurrences are linear in what is known when it begins. With D[t, k] = product of (1 - forget_j)
over k < j <= t and E[k, i] = product of persist_j over i < j <= k, both lower triangular,

    S_k = m_k S_0 - sum_i E[k, i] rate_i u_i,          m_k = product of persist_j over j <= k
    M_t = c_t M_0 + sum_k D[t, k] S_k                  c_t = product of (1 - forget_j) over j <= t
        = c_t M_0 + (D m)_t S_0 - sum_i (D E)[t, i] rate_i u_i
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ctx import Bounds
from ..chunks import Chunks
from ..fast_weights import Matrices, Memory, Net, Steps, answer, by_head, gelu, learn, loss_terms, surprise


def chunked(
    net: Net, q: Tensor, k: Tensor, v: Tensor, weights: Matrices, forget: Tensor, persist: Tensor, rate: Tensor,
    chunk: int, bounds: Bounds, initial: Memory | None, before: tuple[int, ...],
) -> tuple[Tensor, Memory]:  # fmt: skip
    """Arguments as in `neural_memory`."""
    chunks = Chunks.of(bounds, chunk, before if initial is not None else ())
    steps = coefficients(forget, persist, rate, chunks)
    return learn(net, q, k, v, weights if initial is None else initial, steps, chunks)


def coefficients(forget: Tensor, persist: Tensor, rate: Tensor, chunks: Chunks) -> Steps:
    """How much of what is known, and of each token's surprise, is in the memory after each token of a chunk."""
    heads = forget.shape[2]
    kept, persisted, rates = (by_head(chunks.cut(x)) for x in (1 - forget, persist, 2 * rate))
    if chunks.full:
        there, last = None, slice(-1, None)
    else:  # places without a token change nothing; the chunk ends with its last one
        there = chunks.mask.to(rates.device).repeat_interleave(heads, 0)
        kept, persisted = (x.masked_fill(~there, 1) for x in (kept, persisted))
    decay, fade = products(kept), products(persisted)
    momentum = persisted.cumprod(1)
    if there is not None:
        decay = decay * there[:, None]
    store = fade * rates[:, None]
    reach = torch.bmm(decay, store)
    keep, push = kept.cumprod(1)[..., None], torch.bmm(decay, momentum[..., None])

    def at_end(x: Tensor) -> Tensor:
        if there is None:
            return x[:, last]
        place = chunks.last.to(x.device).repeat_interleave(heads)
        return x[torch.arange(len(x), device=x.device), place][:, None]

    return Steps(
        reach=reach, keep=keep, push=push, end_keep=at_end(keep), end_push=at_end(push), take=at_end(reach).mT,
        carry=at_end(momentum[..., None]), store=at_end(store).mT, lasting=True,
    )  # fmt: skip


def products(x: Tensor) -> Tensor:
    """x [N, n] -> [N, n, n]: the product of x_j over i < j <= t at [t, i], 0 above the diagonal. x may be 0."""
    n = x.shape[1]
    below = torch.ones(n, n, dtype=torch.bool, device=x.device).tril(-1)
    return torch.where(below, x[..., None], 1.0).cumprod(1).tril()


def step(
    net: Net, q: Tensor, k: Tensor, v: Tensor, weights: Matrices, forget: Tensor, persist: Tensor, rate: Tensor,
    chunk: int, bounds: Bounds, initial: Memory | None, before: tuple[int, ...],
) -> tuple[Tensor, Memory]:  # fmt: skip
    """One new token for every sequence of a state; arguments as in `neural_memory`."""
    assert initial is not None
    slots, _, heads, d = q.shape
    queries, keys, values = (x.reshape(slots * heads, 1, d) for x in (q, k, v))
    forget, persist, rate = (x.reshape(slots * heads, 1, 1) for x in (forget, persist, rate))
    base, now, momentum = (tuple(w.flatten(0, 1) for w in part) for part in initial)
    inputs, grads = surprise(net, base, keys, *loss_terms(net.norm, keys, values))
    momentum = tuple(
        torch.baddbmm(s * persist, (x * rate).mT, g, alpha=-2) for s, x, g in zip(momentum, inputs, grads, strict=True)
    )
    now = tuple(torch.addcmul(s, w, 1 - forget) for w, s in zip(now, momentum, strict=True))
    z = queries
    for layer, w in enumerate(now):
        z = torch.bmm(gelu(z, net.act) if layer else z, w)
    complete = [(n + 1) % chunk == 0 for n in before]
    if all(complete):
        base = now
    elif any(complete):
        done = torch.tensor(complete, device=q.device).repeat_interleave(heads)[:, None, None]
        base = tuple(torch.where(done, w, b) for w, b in zip(now, base, strict=True))
    base, now, momentum = (tuple(w.unflatten(0, (slots, heads)) for w in part) for part in (base, now, momentum))
    return answer(net.norm, queries, z).view_as(q), Memory(base, now, momentum)

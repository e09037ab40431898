"""The neural long-term memory of Titans (Behrouz et al. 2025, arXiv 2501.00663, sec. 3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...ctx import Bounds
from ..fast_weights import Act, Matrices, Memory, Net, Norm, recall
from .chunked import chunked, step
from .reference import slow

Backend = Literal["reference", "chunked", "step"]


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Matrices,
    forget: Tensor,
    persist: Tensor,
    rate: Tensor,
    *,
    chunk: int,
    norm: Norm | None = None,
    act: Act = "gelu",
    bounds: Bounds,
    initial: Memory | None = None,
    before: tuple[int, ...] = (),
    backend: Backend | None = None,
) -> tuple[Tensor, Memory]:
    """What a memory that learns k -> v as it reads answers to q, [B, T, heads, d], and its state after each sequence.

    The memory M is an MLP with a matrix [heads, in, out] for each of its layers in `weights`, where sequences begin;
    with `norm`, M(x) = x + LN(MLP(x)). Token t answers M_t(q_t), where (eq. 13, 14)

        M_t = (1 - forget_t) M_(t-1) + S_t,    S_t = persist_t S_(t-1) - rate_t * gradient of |M'(k_t) - v_t|^2,

    with forget, persist and rate the paper's alpha, eta and theta, and M' the memory as the chunk of `chunk` tokens
    began (sec. 3.2); with chunks of one token that is M_(t-1).

    q, k, v [B, T, heads, d]; forget, persist, rate [B, T, heads]. `initial` is the state of sequences of which earlier
    calls have seen `before` tokens. Chunks are counted from the first token of each sequence, over all calls.
    """
    if weights[0].shape[1] != q.shape[-1]:
        raise ValueError(f"weights[0] takes {weights[0].shape[1]} inputs, but heads have {q.shape[-1]}")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; a chunk has at least one token")
    if initial is not None and len(before) != len(bounds.sequences):
        raise ValueError(f"`before` has {len(before)} lengths for {len(bounds.sequences)} sequences; give one for each")
    work = torch.promote_types(q.dtype, torch.float32)
    net = Net(act, False, norm and Norm(norm.weight.to(work), norm.bias.to(work), norm.eps))
    args = (
        net, q.to(work), k.to(work), v.to(work), tuple(w.to(work) for w in weights), forget.to(work),
        persist.to(work), rate.to(work), chunk, bounds, initial and initial.to(work), before,
    )  # fmt: skip
    one = initial is not None and bounds.dense and bounds.width == 1
    if backend is None:
        backend = "step" if one else "chunked"
    if backend == "step" and not one:
        raise ValueError("backend 'step' cannot run: it serves one new token for each sequence of a state")
    if backend not in ("reference", "chunked", "step"):
        raise ValueError(f"unknown backend {backend!r}: use 'reference', 'chunked' or 'step'")
    y, final = {"reference": slow, "chunked": chunked, "step": step}[backend](*args)
    return y.to(q.dtype), final


__all__ = ["Backend", "Memory", "Net", "Norm", "neural_memory", "recall"]

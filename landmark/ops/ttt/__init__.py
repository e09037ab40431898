"""TTT layers (Sun et al. 2024, arXiv 2407.04620): the hidden state is a model, its update a step of learning."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...ctx import Bounds
from ..fast_weights import Act, Matrices, Memory, Net, Norm
from .dual import dual, step
from .reference import primal

Backend = Literal["reference", "dual", "step"]


def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Matrices,
    rate: Tensor,
    scale: Tensor,
    *,
    norm: Norm | None = None,
    act: Act = "gelu_tanh",
    bounds: Bounds,
    initial: Memory | None = None,
    before: tuple[int, ...] = (),
    backend: Backend | None = None,
) -> tuple[Tensor, Memory]:
    """The outputs of a TTT layer, [B, T, heads, d], and its state after each sequence.

    The model f is an MLP with a matrix [heads, in, out] for each of its layers in `weights`, where sequences begin
    (W_0), or [heads, in + 1, out] with biases as the last row; with `norm`, f(x) = x + LN(MLP(x)) (sec. 2.7). Token t
    learns by the gradient of |f(k_t) - v_t|^2 / 2 (the loss of eq. 4 is twice that), which is taken at the weights that
    its mini-batch of b = len(scale) tokens began with, and answers q_t with f(q_t; W_t), where

        W_t = W - scale_t * sum of rate_i * gradient_i over the tokens i <= t of its mini-batch.

    q, k, v [B, T, heads, d]; rate [B, T, heads]; scale [b]. `initial` is the state of sequences of which earlier calls
    have seen `before` tokens. Mini-batches are counted from the first token of each sequence, over all calls.
    """
    inner = weights[0].shape[1]
    if inner not in (q.shape[-1], q.shape[-1] + 1):
        raise ValueError(
            f"weights[0] takes {inner} inputs; for heads of {q.shape[-1]} it is that, or one more for biases"
        )
    if initial is not None and len(before) != len(bounds.sequences):
        raise ValueError(f"`before` has {len(before)} lengths for {len(bounds.sequences)} sequences; give one for each")
    work = torch.promote_types(q.dtype, torch.float32)
    net = Net(act, inner > q.shape[-1], norm and Norm(norm.weight.to(work), norm.bias.to(work), norm.eps))
    args = (
        net, q.to(work), k.to(work), v.to(work), tuple(w.to(work) for w in weights), rate.to(work), scale.to(work),
        bounds, initial and initial.to(work), before,
    )  # fmt: skip
    one = initial is not None and bounds.dense and bounds.width == 1
    if backend is None:
        backend = "step" if one else "dual"
    if backend == "step" and not one:
        raise ValueError("backend 'step' cannot run: it serves one new token for each sequence of a state")
    if backend not in ("reference", "dual", "step"):
        raise ValueError(f"unknown backend {backend!r}: use 'reference', 'dual' or 'step'")
    y, final = {"reference": primal, "dual": dual, "step": step}[backend](*args)
    return y.to(q.dtype), final


__all__ = ["Backend", "Memory", "Norm", "ttt"]

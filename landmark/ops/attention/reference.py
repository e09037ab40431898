"""Attention as its papers write it, one sequence at a time, in at least float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ctx import Bounds


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bounds: Bounds,
    k_bounds: Bounds,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Shapes and meaning as in `attention`; `dropout` is refused by the dispatcher, `bias` is added to the scores."""
    out = q.new_zeros(q.shape[0] * q.shape[1], *q.shape[2:-1], v.shape[-1])
    for (qs, tq), (ks, tk) in zip(bounds.sequences, k_bounds.sequences, strict=True):
        qi, ki, vi = (x.reshape(-1, *x.shape[2:])[s : s + n] for x, s, n in ((q, qs, tq), (k, ks, tk), (v, ks, tk)))
        group = q.shape[2] // k.shape[2]
        work = torch.promote_types(q.dtype, torch.float32)
        qi, ki, vi = qi.to(work), ki.to(work).repeat_interleave(group, 1), vi.to(work).repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", qi, ki) * scale
        if bias is not None:
            row_q, row_k = qs % q.shape[1], ks % k.shape[1]
            scores = scores + bias[qs // q.shape[1], :, row_q : row_q + tq, row_k : row_k + tk].to(work)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(tk - tq, tk, device=q.device)[:, None] - torch.arange(tk, device=q.device)
        if causal:
            scores = scores.masked_fill(distance < 0, -torch.inf)
        if window is not None:
            scores = scores.masked_fill(distance.abs() >= window, -torch.inf)
        out[qs : qs + tq] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), vi).to(v.dtype)
    return out.unflatten(0, q.shape[:2])

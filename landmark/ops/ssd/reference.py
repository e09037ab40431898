"""The state space model of Mamba-2 (Dao and Gu 2024, 2405.21060) in its two plain forms, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...ctx import Bounds

# x [T, H, P], dt [T, H], A [H], B and C [T, H, N], h [H, N, P] -> y [T, H, P], h after
Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def recurrent(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T, y_t = h_t^T C_t (eq. 1, with a scalar times the identity for A)."""
    ys: list[Tensor] = []
    for t in range(len(x)):
        h = torch.exp(dt[t] * A)[:, None, None] * h + (dt[t, :, None] * B[t])[:, :, None] * x[t][:, None, :]
        ys.append((C[t][:, :, None] * h).sum(1))
    return torch.stack(ys) if ys else x, h


def quadratic(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """y = (L * C B^T) (dt x), where L[t, s] = exp(A (dt_{s+1} + ... + dt_t)) for s <= t (eq. 16: masked attention)."""
    steps, length = (dt * A).mT, len(x)  # [H, T]
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)
    sums = steps[:, :, None].expand(-1, -1, length).masked_fill(~later, 0).cumsum(1)
    L = sums.exp().tril()
    values = dt[..., None] * x
    since = steps.cumsum(1).exp()  # what is left of the first state at each token
    y = torch.einsum("hts,thn,shn,shp->thp", L, C, B, values) + torch.einsum("ht,thn,hnp->thp", since, C, h)
    if length:
        h = since[:, -1, None, None] * h + torch.einsum("hs,shn,shp->hnp", L[:, -1], B, values)
    return y, h


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bounds: Bounds, initial: Tensor | None,
    form: Form = recurrent,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = form(x, ...) + D x of every sequence; shapes as in the public function."""
    wide = torch.promote_types(x.dtype, torch.float32)
    (heads, width), (groups, states) = x.shape[2:], B.shape[2:]
    x_, dt_, B_, C_ = (t.flatten(0, 1).to(wide) for t in (x, dt, B, C))
    B_, C_ = (t.repeat_interleave(heads // groups, 1) for t in (B_, C_))
    pieces: list[Tensor] = []
    ends: list[Tensor] = []
    at = 0
    for i, (start, length) in enumerate(bounds.sequences):
        if initial is None:
            h = x_.new_zeros(heads, states, width)
        else:
            h = initial[i].to(wide).unflatten(-1, (-1, width)).movedim(2, 1).flatten(0, 1)
        one = slice(start, start + length)
        y, h = form(x_[one], dt_[one], A.to(wide), B_[one], C_[one], h)
        pieces += [x_.new_zeros(start - at, heads, width), y + D.to(wide)[:, None] * x_[one]]
        ends.append(h.unflatten(0, (groups, -1)).movedim(1, 2).flatten(2))
        at = start + length
    pieces.append(x_.new_zeros(len(x_) - at, heads, width))
    final = torch.stack(ends) if ends else x_.new_zeros(0, groups, states, heads // groups * width)
    return torch.cat(pieces).to(x.dtype).view_as(x), final

"""The generalised delta rule (Peng et al. 2025, 2503.14456, eq. 17) and linear attention with decay, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ctx import Bounds


def delta_rule(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, bounds: Bounds,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """S_t = (diag(w_t) + b_t a_t^T) S_{t-1} + k_t v_t^T, y_t = S_t^T r_t; without a and b, y_t = S_{t-1}^T r_t."""
    wide = torch.promote_types(r.dtype, torch.float32)
    r_, w_, k_, v_ = (t.flatten(0, 1).to(wide) for t in (r, log_decay, k, v))
    w_, (heads, n) = w_.exp(), r.shape[2:]
    ys: dict[int, Tensor] = {}
    ends: list[Tensor] = []
    for i, (start, length) in enumerate(bounds.sequences):
        S = r_.new_zeros(heads, n, n) if initial is None else initial[i].to(wide)
        for t in range(start, start + length):
            if a is None or b is None:
                ys[t] = (S * r_[t, :, :, None]).sum(1)
                S = w_[t, :, :, None] * S + k_[t, :, :, None] * v_[t, :, None]
            else:
                a_, b_ = a.flatten(0, 1)[t].to(wide), b.flatten(0, 1)[t].to(wide)
                known = (S * a_[:, :, None]).sum(1, keepdim=True)
                S = w_[t, :, :, None] * S + b_[:, :, None] * known + k_[t, :, :, None] * v_[t, :, None]
                ys[t] = (S * r_[t, :, :, None]).sum(1)
        ends.append(S)
    nothing = r_.new_zeros(heads, n)
    y = torch.stack([ys.get(t, nothing) for t in range(len(r_))]).to(r.dtype).view_as(r)
    return y, torch.stack(ends) if ends else r_.new_zeros(0, heads, n, n)

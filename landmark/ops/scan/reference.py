"""The selective state space model of Mamba (Gu and Dao 2023, 2312.00752), token by token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ctx import Bounds


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, bounds: Bounds,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h_t = exp(d_t A) h_{t-1} + d_t B_t x_t with d = softplus(delta), y_t = (C_t h_t + D x_t) silu(z_t) (eq. 2 and 4;
    B by Euler's rule, as the authors do)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_, delta_, B_, C_ = (t.flatten(0, 1).to(wide) for t in (x, delta, B, C))
    gate = None if z is None else F.silu(z.flatten(0, 1).to(wide))
    step, A, D = F.softplus(delta_), A.to(wide).mT, D.to(wide)  # [N, C]
    ys: dict[int, Tensor] = {}
    ends: list[Tensor] = []
    for i, (start, length) in enumerate(bounds.sequences):
        h = A.new_zeros(A.shape) if initial is None else initial[i].to(wide)
        for t in range(start, start + length):
            h = torch.exp(step[t] * A) * h + B_[t, :, None] * (step[t] * x_[t])
            y = (C_[t, :, None] * h).sum(0) + D * x_[t]
            ys[t] = y if gate is None else y * gate[t]
        ends.append(h)
    nothing = x_.new_zeros(x.shape[2])
    y = torch.stack([ys.get(t, nothing) for t in range(len(x_))]).to(x.dtype).view_as(x)
    return y, torch.stack(ends) if ends else A.new_zeros(0, *A.shape)

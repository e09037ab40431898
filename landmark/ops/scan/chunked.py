"""The selective scan with all chunks side by side: as many steps as a chunk has tokens, then one for each chunk."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ctx import Bounds
from ..chunks import Chunks

SIZE = 16


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, bounds: Bounds,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `reference.selective_scan`; any device. Memory grows with tokens x channels x states."""
    chunks = Chunks.of(bounds, min(SIZE, max(bounds.longest, 1)))
    wide = torch.promote_types(x.dtype, torch.float32)
    A, D = A.to(wide).mT, D.to(wide)  # [N, C]
    # after its last token a sequence waits: its step is softplus(-inf) = 0
    mask = chunks.mask.to(x.device)[..., None]
    step = F.softplus(chunks.cut(delta).to(wide)) * mask  # [chunks, L, C]
    x_, B_, C_ = (chunks.cut(t).to(wide) for t in (x, B, C))
    decay = torch.exp(step[:, :, None] * A)  # [chunks, L, N, C]
    update = B_[..., None] * (step * x_)[:, :, None]
    h = update[:, 0]
    inside = [h]
    for t in range(1, chunks.size):
        h = decay[:, t] * h + update[:, t]
        inside.append(h)
    whole = torch.exp(step.sum(1)[:, None] * A)  # [chunks, N, C]
    count = len(bounds.sequences)
    state = A.new_zeros(count, *A.shape) if initial is None else initial.to(wide)
    state = state[chunks.order.to(x.device)]
    before: list[Tensor] = []
    for s in chunks.steps:
        n = s.stop - s.start
        before.append(state[:n])
        state = torch.cat([whole[s] * state[:n] + h[s], state[n:]])
    y = x.new_zeros(x.shape)
    if before:
        carried = torch.exp(step.cumsum(1)[:, :, None] * A) * torch.cat(before)[:, None]
        y_ = (C_[..., None] * (torch.stack(inside, 1) + carried)).sum(2) + D * x_
        y_ = y_ if z is None else y_ * F.silu(chunks.cut(z).to(wide))
        y = chunks.join(y_.to(x.dtype))
    return y, state[chunks.place.to(x.device)]

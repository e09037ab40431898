"""State space duality: attention within chunks, a recurrence between them, nearly all of it matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ctx import Bounds
from ..chunks import Chunks


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bounds: Bounds, initial: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `reference.ssd`; any device. Products in x's dtype, decays and states in at least float32 (sec. 6)."""
    chunks = Chunks.of(bounds, min(chunk, max(bounds.longest, 1)))
    wide = torch.promote_types(x.dtype, torch.float32)
    (heads, width), (groups, states) = x.shape[2:], B.shape[2:]
    each = heads // groups
    count = len(bounds.sequences)
    state = initial if initial is not None else x.new_zeros(count, groups, states, each * width, dtype=wide)
    state = state.to(wide)[chunks.order.to(x.device)]
    if not chunks.count:
        return torch.zeros_like(x), state[chunks.place.to(x.device)]

    steps = chunks.cut(dt.to(wide)).transpose(1, 2)  # [K, H, L]
    sums = (steps * A.to(wide)[:, None]).double().cumsum(-1)
    x_ = chunks.cut(x)  # [K, L, H, P]
    values = (x_ * steps.mT[..., None]).to(x.dtype)
    B_, C_ = (chunks.cut(t).transpose(1, 2) for t in (B, C))  # [K, G, L, N]

    scores = (C_ @ B_.mT)[:, :, None] * decays(sums, wide).unflatten(1, (groups, each))  # [K, G, H / G, L, L]
    inside = scores.flatten(1, 2).to(x.dtype) @ values.transpose(1, 2)  # [K, H, L, P]

    left = (sums[..., -1:] - sums).exp().to(x.dtype).mT[..., None]  # what is left of a token at its chunk's end
    update = B_.mT @ (values * left).unflatten(2, (groups, each)).flatten(3).transpose(1, 2)  # [K, G, N, H / G * P]
    whole = sums[..., -1].exp().to(wide).view(-1, groups, 1, each, 1)
    before: list[Tensor] = []
    for step in chunks.steps:
        n = step.stop - step.start
        before.append(state[:n])
        kept = (state[:n].unflatten(-1, (each, width)) * whole[step]).flatten(-2)
        state = torch.cat([kept + update[step], state[n:]])
    carried = (C_ @ torch.cat(before).to(x.dtype)).transpose(1, 2)  # [K, L, G, H / G * P]
    since = sums.exp().to(wide).mT[..., None]
    y = carried.reshape(x_.shape) * since + inside.transpose(1, 2) + D.to(wide)[:, None] * x_
    return chunks.join(y.to(x.dtype)), state[chunks.place.to(x.device)]


def decays(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(sums[t] - sums[s]) for s <= t, else 0: [..., L] -> [..., L, L], exact to `dtype` for sums of any size.

    The difference of two large sums that were rounded to `dtype` would not be; that of the rounded sums plus that of
    what rounding left is.
    """
    high = sums.to(dtype)
    low = (sums.detach() - high.detach()).to(dtype)
    past = torch.ones(*sums.shape[-1:] * 2, dtype=torch.bool, device=sums.device).tril()
    difference = high[..., :, None] - high[..., None, :] + (low[..., :, None] - low[..., None, :])
    return difference.masked_fill(~past, -torch.inf).exp()

"""WKV with all chunks side by side: as many steps as a chunk has tokens, then one for each chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ctx import Bounds
from ..chunks import Chunks
from .reference import NOTHING, added, closed, opened

SIZE = 16


def wkv(
    k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, bounds: Bounds, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `reference.wkv`; any device."""
    chunks = Chunks.of(bounds, min(SIZE, max(bounds.longest, 1)))
    wide = torch.promote_types(k.dtype, torch.float32)
    w, u = log_decay.to(wide), bonus.to(wide)
    k_, v_ = chunks.cut(k).to(wide), chunks.cut(v).to(wide)
    there = chunks.mask.to(k.device)[..., None]
    k_ = torch.where(there, k_, NOTHING)  # no weight
    steps = there.to(wide).cumsum(1)  # [chunks, L, 1]: decays are counted while there are tokens
    one, none = torch.ones_like(v_[:, 0]), torch.zeros_like(v_[:, 0])
    a, b, m = none, none, torch.full_like(none, NOTHING)
    inside: list[tuple[Tensor, Tensor, Tensor]] = []  # what is known before each token, of those in its chunk
    for t in range(chunks.size):
        inside.append((a, b, m))
        a, b, m = added(a, b, m + w * there[:, t], v_[:, t], one * there[:, t], k_[:, t])
    count = len(bounds.sequences)
    state = w.new_zeros(count, 3, len(w)) if initial is None else initial.to(wide)
    before: list[Tensor] = []
    state, whole = state[chunks.order.to(k.device)], steps[:, -1] * w
    for s in chunks.steps:
        n = s.stop - s.start
        before.append(state[:n])
        old_a, old_b, old_m = opened(state[:n])
        state = torch.cat([closed(*added(old_a, old_b, old_m + whole[s], a[s], b[s], m[s])), state[n:]])
    y = k.new_zeros(k.shape)
    if before:
        old_a, old_b, old_m = (x[:, None] for x in opened(torch.cat(before)))
        in_a, in_b, in_m = (torch.stack(x, 1) for x in zip(*inside, strict=True))
        known = added(old_a, old_b, old_m + (steps - 1) * w, in_a, in_b, in_m)
        total, weight, _ = added(*known, v_, torch.ones_like(v_), u + k_)
        y = chunks.join((total / torch.where(there, weight, 1)).to(k.dtype))
    return y, state[chunks.place.to(k.device)]

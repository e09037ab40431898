"""Token shift (Peng et al. 2023, 2305.13048, eq. 11 to 13) in plain torch: any device, any layout of sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ctx import Bounds
from ..spans import covers


def token_mix(x: Tensor, mix: Tensor, bounds: Bounds, initial: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """y_n[t] = x[t] + (x[t - 1] - x[t]) mix_n."""
    count = len(bounds.sequences)
    first = x.new_zeros(count, x.shape[2]) if initial is None else initial.to(x.dtype)
    if bounds.dense and bounds.width:
        before, last = torch.cat([first[:, None], x[:, :-1]], 1), x[:, -1]
    else:
        earlier, ends = bounds.memo("shift", lambda: _sources(bounds))
        rows = torch.cat([first, x.flatten(0, 1)])
        before, last = rows[earlier.to(x.device)].view_as(x), rows[ends.to(x.device)]
    step = before - x
    mixed = [torch.addcmul(x, step, row.to(x.dtype)) for row in mix.unbind()]
    if not covers(bounds):
        outside = (bounds.index(x.device) < 0)[..., None]
        mixed = [y.masked_fill(outside, 0) for y in mixed]
    return mixed, last


def _sources(bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Where, among the initial rows of all sequences and then all tokens, is what comes before each token, and what
    each sequence ends with."""
    count, number = len(bounds.sequences), bounds.index().flatten()
    place = count + torch.arange(len(number)) - 1
    earlier = torch.where(bounds.offsets().flatten() > 0, place, number.clamp_min(0))
    ends = [count + start + n - 1 if n else i for i, (start, n) in enumerate(bounds.sequences)]
    return earlier, torch.tensor(ends, dtype=torch.long)

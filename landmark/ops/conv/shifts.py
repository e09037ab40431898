"""A causal depthwise convolution as a sum of shifted rows: any device, any layout of sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ctx import Bounds
from ..spans import covers


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, bounds: Bounds, initial: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.causal_conv`; sums in float32."""
    (channels, taps), flat = weight.shape, x.flatten(0, 1)
    count = len(bounds.sequences)
    if initial is None:
        initial = x.new_zeros(count, taps - 1, channels)
    earlier, last = bounds.memo(("conv", taps), lambda: _sources(bounds, taps))
    rows = torch.cat([initial.to(x.dtype).flatten(0, 1), flat])
    wide = torch.promote_types(x.dtype, torch.float32)
    w = weight.to(wide).mT
    y = flat * w[-1]
    for back, source in enumerate(earlier.to(x.device), 1):
        y = y + rows[source] * w[-1 - back]
    if bias is not None:
        y = y + bias
    if silu:
        y = F.silu(y)
    if not covers(bounds):
        y = y.masked_fill((bounds.index(x.device).flatten() < 0)[:, None], 0)
    return y.to(x.dtype).view_as(x), rows[last.to(x.device)]


def _sources(bounds: Bounds, taps: int) -> tuple[Tensor, Tensor]:
    """Where, among the initial rows of all sequences and then all tokens, is what lies 1 .. taps - 1 before each token
    [taps - 1, tokens], and what each sequence ends with [sequences, taps - 1]."""
    kept, count = taps - 1, len(bounds.sequences)
    tokens, base = bounds.rows * bounds.width, count * kept
    number, offset = bounds.index().flatten().clamp_min(0), bounds.offsets().flatten()
    back = torch.arange(1, taps)[:, None]
    before = number * kept + kept + offset - back
    earlier = torch.where(offset >= back, torch.arange(base, base + tokens) - back, before)
    starts, lengths = torch.tensor(bounds.sequences, dtype=torch.long).view(-1, 2, 1).unbind(1)
    place = lengths - kept + torch.arange(kept)
    held = torch.arange(count)[:, None] * kept + kept + place
    return earlier, torch.where(place >= 0, base + starts + place, held)

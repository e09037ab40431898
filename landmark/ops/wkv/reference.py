"""The WKV operator of RWKV-4 (Peng et al. 2023, 2305.13048, eq. 16 and app. D), token by token.

Sums of exponentials are kept as a, b in units of e^m, m being the largest exponent so far: no exponent overflows. The
unit is a matter of bookkeeping, through which no gradient flows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ctx import Bounds

NOTHING = -1e38  # the logarithm of no weight at all


def added(a: Tensor, b: Tensor, m: Tensor, v: Tensor, weight: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b) e^m + (v, weight) e^k, in units of the larger one."""
    unit = torch.maximum(m, k).detach()
    old, new = torch.exp(m - unit), torch.exp(k - unit)
    return a * old + v * new, b * old + weight * new, unit


def opened(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a, b, m of states [..., 3, C]; where the weight is 0, nothing was seen."""
    a, b, m = state.unbind(-2)
    return a, b, torch.where(b == 0, NOTHING, m.detach())


def closed(a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    """States [..., 3, C]; zeros where nothing was seen."""
    return torch.stack([a, b, torch.where(b == 0, 0, m.detach())], -2)


def wkv(
    k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, bounds: Bounds, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token after the other."""
    wide = torch.promote_types(k.dtype, torch.float32)
    k_, v_, w, u = (t.to(wide) for t in (k.flatten(0, 1), v.flatten(0, 1), log_decay, bonus))
    one = torch.ones_like(w)
    ys: dict[int, Tensor] = {}
    ends: list[Tensor] = []
    for i, (start, length) in enumerate(bounds.sequences):
        a, b, m = opened(w.new_zeros(3, len(w)) if initial is None else initial[i].to(wide))
        for t in range(start, start + length):
            total, weight, _ = added(a, b, m, v_[t], one, u + k_[t])
            ys[t] = total / weight
            a, b, m = added(a, b, m + w, v_[t], one, k_[t])
        ends.append(closed(a, b, m))
    nothing = torch.zeros_like(w)
    y = torch.stack([ys.get(t, nothing) for t in range(len(k_))]).to(k.dtype).view_as(k)
    return y, torch.stack(ends) if ends else w.new_zeros(0, 3, len(w))

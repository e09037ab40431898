"""Which proposals are kept (Leviathan et al. 2023, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def verify(p: Tensor, q: Tensor | None, drafts: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Which proposals are kept, and what follows them.

    p [n, k + 1, V]: the model's probabilities at every place; q [n, k, V]: those that `drafts` [n, k] were drawn from,
    None where they were not drawn but chosen; uniform [n, k + 1] in [0, 1). -> counts [n] in 0 ... k, tokens [n].
    """
    n, k = drafts.shape
    chosen = p[:, :k].gather(2, drafts[..., None]).squeeze(2)
    drawn = torch.ones_like(chosen) if q is None else q.gather(2, drafts[..., None]).squeeze(2)
    kept = uniform[:, :k] * drawn < chosen
    counts = kept.long().cumprod(1).sum(1)
    rows = torch.arange(n, device=p.device)
    rest, at = p[rows, counts].double(), counts.clamp_max(k - 1) if k else counts
    if k:
        refused = (counts < k)[:, None]
        less = torch.nn.functional.one_hot(drafts[rows, at], p.shape[2]) if q is None else q[rows, at]
        left = (rest - less.double()).clamp_min(0)
        # Rounding may leave nothing where p and q are equal: then p itself is right.
        rest = torch.where(refused & (left.sum(1, keepdim=True) > 0), left, rest)
    total = rest.cumsum(1)
    tokens = torch.searchsorted(total, (uniform[:, k:].double() * total[:, -1:]).contiguous(), right=True).squeeze(1)
    return counts, tokens.clamp_max(p.shape[2] - 1)


def expected_tokens(acceptance: float, proposals: int) -> float:
    """Tokens that a call of the model gives on average (eq. 1)."""
    return proposals + 1.0 if acceptance == 1 else (1 - acceptance ** (proposals + 1)) / (1 - acceptance)

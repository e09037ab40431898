"""The delta rule a chunk at a time, in matrix products; any device, exact for decays of any strength.

With B_t the sum of log decays up to t, and S the state that a chunk begins with, what a token's `a` finds in memory is

    u_t = S^T (a_t e^B_{t-1}) + sum over s < t of (ab)_ts u_s + (ak)_ts v_s,   (ak)_ts = sum_n a_t k_s e^(B_{t-1} - B_s)

a triangular system, and then y_t and the state after the chunk are sums of the same kind. Every exponent is at most 0,
and is summed from s on, not as a difference of large numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ctx import Bounds
from ..chunks import Chunks

SIZE = 16


def delta_rule(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, bounds: Bounds,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `reference.delta_rule`. Memory grows with tokens x chunk x width."""
    (heads, n), count = r.shape[2:], len(bounds.sequences)
    chunks = Chunks.of(bounds, min(SIZE, max(bounds.longest, 1)))
    wide = torch.promote_types(r.dtype, torch.float32)

    def cut(x: Tensor) -> Tensor:  # [chunks, H, L, N]
        return chunks.cut(x).to(wide).transpose(1, 2)

    r_, k_, v_, w_ = cut(r), cut(k), cut(v), cut(log_decay)  # places without a token have log decay 0
    size, after = chunks.size, w_.cumsum(2)
    inside = torch.ones(size, size, dtype=torch.bool, device=r.device).tril()
    past = inside.tril(-1)
    gap = torch.where(past[..., None], w_[:, :, :, None], 0).cumsum(2)  # [chunks, H, t, s, N]: of tokens in s + 1 .. t
    before, until = (torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2) for x in (after, gap))  # short of t

    def meets(x: Tensor, gap: Tensor, seen: Tensor) -> Tensor:
        """[chunks, H, L, L, N]: x_t e^gap where s is seen, else 0."""
        return x[:, :, :, None] * torch.exp(gap.masked_fill(~seen[..., None], -torch.inf))

    rest = gap[:, :, -1].exp()  # of a token's weight at the end of its chunk
    stored = k_ * rest
    if a is None or b is None:
        reads, seen_by_r = r_ * before.exp(), meets(r_, until, past)
    else:
        reads, seen_by_r = r_ * after.exp(), meets(r_, gap, inside)
        a_, b_ = cut(a), cut(b)
        found = meets(a_, until, past)
        ak, ab = (torch.einsum("chtsn,chsn->chts", found, x) for x in (k_, b_))
        solve = torch.eye(size, dtype=wide, device=r.device) - ab
        both = torch.cat([a_ * before.exp(), ak @ v_], -1)
        both = torch.linalg.solve_triangular(solve, both, upper=False, unitriangular=True)
        of_state, of_values = both.split(n, -1)  # u = of_state S + of_values
        written = b_ * rest
    rk = torch.einsum("chtsn,chsn->chts", seen_by_r, k_)
    y_ = rk @ v_
    update, keep = stored.mT @ v_, after[:, :, -1:].exp().mT
    if a is not None and b is not None:
        rb = torch.einsum("chtsn,chsn->chts", seen_by_r, b_)
        y_, reads = y_ + rb @ of_values, reads + rb @ of_state
        update, change = update + written.mT @ of_values, written.mT @ of_state
    S = r_.new_zeros(count, heads, n, n) if initial is None else initial.to(wide)
    S = S[chunks.order.to(r.device)]
    known: list[Tensor] = []
    for s in chunks.steps:
        here = S[: s.stop - s.start]
        known.append(here)
        new = keep[s] * here + update[s]
        if a is not None:
            new = new + change[s] @ here
        S = torch.cat([new, S[len(here) :]])
    y = r.new_zeros(r.shape)
    if known:
        y = chunks.join((y_ + reads @ torch.cat(known)).transpose(1, 2).to(r.dtype))
    return y, S[chunks.place.to(r.device)]

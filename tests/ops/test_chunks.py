"""Chunks: cutting and joining are inverse, nothing crosses sequences, and steps follow each sequence in order."""

from __future__ import annotations

import pytest
import torch

from landmark.ctx import Bounds
from landmark.ops.chunks import Chunks

CASES = {
    "dense even": Bounds(2, 12),
    "dense uneven": Bounds(2, 13),
    "packed": Bounds(2, 10, ((0, 3), (3, 7), (10, 1), (11, 9))),
    "padded": Bounds.padded((5, 9, 2), 9),
    "flat": Bounds.of_lengths((4, 1, 11)),
}


@pytest.mark.parametrize("bounds", CASES.values(), ids=CASES)
@pytest.mark.parametrize("size", [1, 4, 16])
def test_a_running_sum_over_chunks_is_the_sum_of_each_sequence(bounds: Bounds, size: int) -> None:
    chunks = Chunks.of(bounds, size)
    x = torch.randn(bounds.rows, bounds.width, 3, dtype=torch.float64)
    initial = torch.randn(len(bounds.sequences), 3, dtype=torch.float64)
    cut = chunks.cut(x)
    inside, total = cut.cumsum(1), cut.sum(1)
    h, before = initial[chunks.order], torch.empty_like(total)
    for step in chunks.steps:
        n = step.stop - step.start
        before[step] = h[:n]
        h[:n] += total[step]
    y = chunks.join(inside + before[:, None])
    flat, out = x.flatten(0, 1), y.flatten(0, 1)
    covered = torch.zeros(len(flat), dtype=torch.bool)
    for i, (start, length) in enumerate(bounds.sequences):
        want = flat[start : start + length].cumsum(0) + initial[i]
        torch.testing.assert_close(out[start : start + length], want)
        torch.testing.assert_close(h[chunks.place][i], want[-1])
        covered[start : start + length] = True
    assert (out[~covered] == 0).all()


@pytest.mark.parametrize("bounds", CASES.values(), ids=CASES)
@pytest.mark.parametrize("size", [1, 4, 16])
def test_chunks_go_on_where_earlier_calls_left_them(bounds: Bounds, size: int) -> None:
    before = tuple(range(3, 3 + len(bounds.sequences)))
    chunks = Chunks.of(bounds, size, before)
    place = torch.zeros(bounds.rows, bounds.width, dtype=torch.long)
    place += bounds.offsets() + bounds.per_token(torch.tensor(before))
    cut = chunks.cut(place)
    want = torch.arange(size).expand_as(cut)
    torch.testing.assert_close(cut[chunks.mask] % size, want[chunks.mask])
    assert (cut[~chunks.mask] == 0).all()
    assert (chunks.last == torch.where(chunks.mask, want, 0).max(1).values).all()
    covered = bounds.index() >= 0
    torch.testing.assert_close(chunks.join(cut), place.masked_fill(~covered, 0))

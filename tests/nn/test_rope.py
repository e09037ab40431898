"""Rotary positions: what they promise, and every way to stretch them, against the reference formulas."""

from __future__ import annotations

import pytest
import torch

from landmark.ctx import Bounds, Ctx
from landmark.nn.rope import Rope
from landmark.nn.rope_scaling import LinearRope, Llama3Rope, NTKRope, YaRN, base_frequencies


def ctx(positions: torch.Tensor) -> Ctx:
    return Ctx(positions, Bounds(*positions.shape))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 6])
def test_scores_depend_on_distance_only(interleaved: bool, dim: int | None) -> None:
    rope = Rope.Config(interleaved=interleaved, dim=dim).build(16)
    q, k = torch.randn(2, 1, 1, 3, 16, dtype=torch.float64)

    def score(m: int, n: int) -> torch.Tensor:
        return (rope(q, ctx(torch.tensor([[m]]))) * rope(k, ctx(torch.tensor([[n]])))).sum(-1)

    assert torch.allclose(score(7, 3), score(104, 100), atol=1e-5)
    assert not torch.allclose(score(7, 3), score(8, 3), atol=1e-3)


def test_layouts_differ_by_a_permutation() -> None:
    x, at = torch.randn(1, 5, 2, 8), ctx(torch.arange(5)[None])
    halves, pairs = Rope.Config().build(8), Rope.Config(interleaved=True).build(8)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # pairs (i, i + d/2) put side by side
    assert torch.allclose(halves(x, at)[..., order], pairs(x[..., order], at), atol=1e-6)


def test_partial_leaves_the_rest() -> None:
    x, at = torch.randn(1, 4, 2, 10), ctx(torch.arange(4)[None])
    y = Rope.Config(dim=4).build(10)(x, at)
    assert torch.equal(y[..., 4:], x[..., 4:]) and not torch.equal(y[:, 1:, :, :4], x[:, 1:, :, :4])


def test_interpolation_and_ntk() -> None:
    base, totals = base_frequencies(1e4, 64), torch.tensor([[8]])
    assert torch.allclose(LinearRope(factor=4.0).frequencies(1e4, 64, totals), base / 4)
    ntk = NTKRope(factor=4.0).frequencies(1e4, 64, totals)
    assert torch.isclose(ntk[0], base[0]) and torch.isclose(ntk[-1], base[-1] / 4)  # fastest kept, slowest interpolated


def test_blends_keep_fast_pairs_and_interpolate_slow_ones() -> None:
    base, totals = base_frequencies(5e5, 128), torch.tensor([[8]])
    for scaling in (YaRN(factor=8.0, original=8192), Llama3Rope(factor=8.0, low=1.0, high=4.0, original=8192)):
        stretched = scaling.frequencies(5e5, 128, totals)
        assert torch.allclose(stretched[:18], base[:18]) and torch.allclose(stretched[-20:], base[-20:] / 8)
        assert (stretched.diff() < 0).all()
    assert abs(YaRN(factor=8.0, original=8192).attention_factor - 1.2079) < 1e-4  # 0.1 ln 8 + 1


def test_tables_are_made_once_a_pass() -> None:
    at = ctx(torch.arange(4)[None])
    rope = Rope.Config().build(8)
    assert rope.tables(at, torch.float32)[0] is Rope.Config().build(8).tables(at, torch.float32)[0]
    assert Rope.Config(theta=99.0).build(8).tables(at, torch.float32)[0] is not rope.tables(at, torch.float32)[0]

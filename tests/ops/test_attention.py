"""Every backend x dtype x awkward shape, forward and backward, against the equations in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from landmark.ctx import Bounds
from landmark.ops.attention import attention, reference, visible

SHAPES = {  # name: (bounds of q, bounds of k)
    "dense": (Bounds(2, 63), Bounds(2, 63)),
    "one query": (Bounds(3, 1), Bounds(3, 41)),
    "chunk": (Bounds(2, 7), Bounds(2, 40)),
    "ragged": (Bounds.of_lengths((1, 30, 17)), Bounds.of_lengths((1, 30, 17))),
    "packed rows": (Bounds(2, 20, ((0, 3), (3, 17), (20, 20))), Bounds(2, 20, ((0, 3), (3, 17), (20, 20)))),
    "padded rows": (Bounds.padded((5, 12), 12), Bounds.padded((5, 12), 12)),
    "decode": (Bounds(3, 1), Bounds.padded((4, 33, 1), 33)),
    "padded on both sides": (Bounds.padded((5, 3), 6), Bounds.padded((7, 8), 9)),
    "padded queries": (Bounds.padded((5, 3), 6), Bounds(2, 8)),
    "rows that are not sequences": (Bounds(2, 6, ((0, 3), (3, 3))), Bounds(2, 9, ((0, 4), (9, 5)))),
    "ragged chunk": (Bounds.of_lengths((4, 9)), Bounds.padded((20, 9), 24)),
}


def inputs(bounds: Bounds, k_bounds: Bounds, dtype: torch.dtype, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(bounds.rows, bounds.width, 4, 16, generator=g)
    k = torch.randn(k_bounds.rows, k_bounds.width, kv_heads, 16, generator=g)
    v = torch.randn(k_bounds.rows, k_bounds.width, kv_heads, 24, generator=g)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_backends(shape: str, dtype: torch.dtype) -> None:
    bounds, k_bounds = SHAPES[shape]
    for causal, window, softcap in itertools.product((True, False), (None, 1, 6), (None, 3.0)):
        options = {"scale": 0.3, "causal": causal, "window": window, "softcap": softcap}
        tensors = [t.requires_grad_() for t in inputs(bounds, k_bounds, dtype)]
        exact = [t.detach().double().requires_grad_() for t in tensors]
        y = attention(*tensors, bounds=bounds, k_bounds=k_bounds, **options)
        want = reference(*exact, bounds=bounds, k_bounds=k_bounds, **options)
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
        assert y.dtype == dtype
        assert (y - want).abs().max() <= tolerance * want.abs().max()
        weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y.backward(weight.to(dtype))
        want.backward(weight)
        for ours, theirs in zip(tensors, exact, strict=True):
            assert (ours.grad - theirs.grad).abs().max() <= 2 * tolerance * theirs.grad.abs().max()


def test_bias_needs_no_other_path() -> None:
    bounds = Bounds(2, 9, ((0, 4), (4, 5), (9, 7)))
    q, k, v = inputs(bounds, bounds, torch.float64)
    bias = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    options = {"scale": 0.3, "causal": False, "bias": bias, "bounds": bounds, "k_bounds": bounds}
    assert (attention(q, k, v, **options) - reference(q, k, v, **options)).abs().max() < 1e-12


@pytest.mark.parametrize("shape", ["packed rows", "padded rows", "ragged", "decode"])
def test_nothing_outside_a_sequence_is_read(shape: str) -> None:
    """Keys and values that belong to no sequence may be anything finite; those of another sequence, even NaN."""
    bounds, k_bounds = SHAPES[shape]
    q, k, v = inputs(bounds, k_bounds, torch.float32)
    clean = attention(q, k, v, bounds=bounds, k_bounds=k_bounds, scale=0.3, causal=True)
    owner = k_bounds.index()
    k2, v2 = k.clone(), v.clone()
    k2[owner != 0], v2[owner != 0] = 1e4, -1e4
    dirty = attention(q, k2, v2, bounds=bounds, k_bounds=k_bounds, scale=0.3, causal=True)
    assert torch.equal(clean[bounds.index() == 0], dirty[bounds.index() == 0])


def test_forcing_a_backend_that_cannot() -> None:
    bounds = Bounds(1, 3)
    q, k, v = inputs(bounds, bounds, torch.float32)
    with pytest.raises(ValueError, match="soft cap"):
        attention(q, k, v, bounds=bounds, scale=1.0, causal=True, softcap=2.0, backend="sdpa")
    with pytest.raises(ValueError, match="no such backend"):
        attention(q, k, v, bounds=bounds, scale=1.0, causal=True, backend="flash9")


def test_visible() -> None:
    seen = visible(Bounds(1, 2), Bounds(1, 4), causal=True, window=2, device=torch.device("cpu"))
    assert seen[0, 0].tolist() == [[False, True, True, False], [False, False, True, True]]


def test_bounds() -> None:
    segments = torch.tensor([[1, 1, 2, 0, 0], [3, 3, 3, 3, 3]])
    bounds = Bounds.of_segments(segments)
    assert bounds.sequences == ((0, 2), (2, 1), (3, 2), (5, 5))
    assert bounds.offsets().tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]
    assert bounds.index().tolist() == [[0, 0, 1, 2, 2], [3] * 5]
    assert Bounds.of_segments(torch.ones(2, 3, dtype=torch.long)).dense
    assert Bounds.padded((2, 3), 3).index().tolist() == [[0, 0, -1], [1, 1, 1]]

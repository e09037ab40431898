"""Latent attention's step: every backend against float64."""

from __future__ import annotations

import os

import pytest
import torch

from landmark.ops.latent import absorb, reference, why_not

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float64: 1e-13}
SHAPES = {"even": (4, 32, 16, 64), "odd": (3, 7, 6, 37), "one head": (1, 24, 2, 130)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_every_backend(shape: tuple[int, int, int, int], interleaved: bool, backend: str, dtype: torch.dtype) -> None:
    heads, d, r, rank = shape
    for rows, width, tables in ((1, 1, 1), (1, 7, 1), (5, 1, 5), (5, 1, 1), (16, 1, 16)):
        g = torch.Generator().manual_seed(rows)
        sizes = [
            (rows, width, heads, d + r), (rows, width, rank + r), (heads, d + 3, rank), (rank,),
            (tables, width, r // 2), (tables, width, r // 2),
        ]  # fmt: skip
        q, down, weight, scale, cos, sin = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in sizes)
        inputs = q, down, weight[:, :d], scale, cos, sin
        options = dict(eps=1e-5, offset=0.5, interleaved=interleaved)
        if why_not(backend, *inputs[:5]):  # type: ignore[arg-type]
            assert dtype is torch.float64 or os.environ.get("LANDMARK_NATIVE") == "0"
            return
        got = absorb(*inputs, **options, backend=backend)  # type: ignore[arg-type]
        want = reference.absorb(*(t.double() for t in inputs), *options.values())  # type: ignore[arg-type]
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape and a.dtype == dtype
            assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()


def test_bad_calls() -> None:
    q, down, weight, scale, cos = (torch.zeros(s) for s in ((1, 1, 2, 10), (1, 1, 12), (2, 6, 8), (8,), (1, 1, 2)))
    absorb(q, down, weight, scale, cos, cos, eps=1e-6, offset=0.0, interleaved=True)
    with pytest.raises(ValueError, match=r"must be \[B, T, H, d \+ 4\]"):
        absorb(q, down[..., 1:], weight, scale, cos, cos, eps=1e-6, offset=0.0, interleaved=True)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        why_not("gpu", q, down, weight, scale, cos)  # type: ignore[arg-type]
    assert "gradient" in str(why_not("cpu", q.requires_grad_(), down, weight, scale, cos)) or os.environ.get(
        "LANDMARK_NATIVE"
    )

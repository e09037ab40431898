"""Linear maps of heads: every backend against float64, for both ways in which a weight may lie."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from landmark.ops.headwise import headwise, reference, why_not

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}


def weights(heads: int, out: int, width: int, columns: bool) -> Tensor:
    """A slice of a larger matrix, as latent attention has it: rows contiguous, or columns."""
    shape = (heads, width + 3, out) if columns else (heads, out + 3, width)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return whole[:, :width].mT if columns else whole[:, :out]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(("heads", "out", "width"), [(1, 64, 128), (3, 100, 37), (5, 7, 130), (4, 16, 16)])
def test_every_backend(heads: int, out: int, width: int, columns: bool, backend: str, dtype: torch.dtype) -> None:
    weight = weights(heads, out, width, columns).to(dtype)
    for n in (1, 2, 5, 16):
        x = torch.randn(n, 1, heads, width + 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        x = x.to(dtype)[..., :width]
        if why_not(backend, x, weight):
            assert backend == "cpu" and (dtype is torch.float64 or os.environ.get("LANDMARK_NATIVE") == "0")
            return
        want = reference.headwise(x.double(), weight.double())
        got = headwise(x, weight, backend=backend)
        assert got.shape == (n, 1, heads, out) and got.dtype == dtype
        assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


def test_gradients() -> None:
    x, weight = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    for backend in ("reference", "torch"):
        assert torch.autograd.gradcheck(
            lambda x, w, b=backend: headwise(x, w, backend=b), (x.requires_grad_(), weight.requires_grad_())
        )
    assert headwise(x.float(), weight.float()).requires_grad


def test_what_cannot_run() -> None:
    x, weight = torch.zeros(17, 2, 4), torch.zeros(2, 5, 4)
    with pytest.raises(ValueError, match="1 to 16 rows, not 17"):
        headwise(x, weight, backend="cpu")
    with pytest.raises(ValueError, match=r"x \[17, 2, 4\] and weight \[2, 4, 5\]"):
        headwise(x, weight.mT)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        headwise(x, weight, backend="gpu")  # type: ignore[arg-type]

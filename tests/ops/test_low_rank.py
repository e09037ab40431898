"""What adapters add: every backend against float64."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from landmark.ops.low_rank import add_low_rank, reference, why_not

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}


def drawn(rows: int, width: int, out: int, rank: int, dtype: torch.dtype) -> list[Tensor]:
    """y, x, A and B, whose columns lie together."""
    generator = torch.Generator().manual_seed(rows)
    shapes = (rows, 1, out), (rows, 1, width), (rank, width), (rank, out)
    y, x, A, B = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return [y, x, A, B.mT]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize(
    ("width", "out", "rank"), [(64, 128, 8), (37, 101, 3), (130, 7, 16), (5, 1100, 1), (96, 600, 66)]
)
def test_every_backend(width: int, out: int, rank: int, backend: str, dtype: torch.dtype) -> None:
    for rows in (1, 2, 5, 16):
        y, x, A, B = drawn(rows, width, out, rank, dtype)
        if why_not(backend, y, x, A, B):
            assert backend == "cpu" and (dtype is torch.float64 or os.environ.get("LANDMARK_NATIVE") == "0")
            return
        want = reference.add_low_rank(y.double(), x.double(), A.double(), B.double(), 0.7)
        guarded = torch.full((rows + 2, 1, out), float("nan"), dtype=dtype)
        guarded[1:-1] = y
        with torch.no_grad():
            got = add_low_rank(guarded[1:-1], x, A, B, 0.7, backend=backend)
        assert got.shape == y.shape and got.dtype == dtype
        assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
        assert guarded[0].isnan().all() and guarded[-1].isnan().all()


def test_rows_do_not_depend_on_their_neighbours() -> None:
    y, x, A, B = drawn(9, 100, 700, 12, torch.float32)
    if why_not("cpu", y, x, A, B) is None:
        together = add_low_rank(y.clone(), x, A, B, 0.5, backend="cpu")
        apart = [add_low_rank(y[n : n + 1].clone(), x[n : n + 1], A, B, 0.5, backend="cpu") for n in range(9)]
        assert torch.equal(together, torch.cat(apart))


def test_gradients() -> None:
    tensors = [t.requires_grad_() for t in drawn(3, 5, 4, 2, torch.float64)]
    for backend in ("reference", "torch"):
        assert torch.autograd.gradcheck(lambda *t, b=backend: add_low_rank(*t, 0.7, backend=b), tensors)
    y, x, A, B = (t.detach().float() for t in tensors)
    assert add_low_rank(y, x, A.requires_grad_(), B, 1.0).requires_grad and torch.equal(y, tensors[0].float())


def test_wide_factors() -> None:
    """Factors in float32 beside activations in bfloat16: computed in float32, given back in bfloat16."""
    y, x, A, B = drawn(4, 64, 32, 8, torch.float32)
    want = reference.add_low_rank(y.double(), x.bfloat16().double(), A.double(), B.double(), 0.7)
    with torch.no_grad():
        got = add_low_rank(y.bfloat16(), x.bfloat16(), A, B, 0.7)
    assert got.dtype == torch.bfloat16 and (got.double() - want).abs().max() <= 1e-2 * want.abs().max()


def test_what_cannot_run() -> None:
    y, x, A, B = drawn(17, 5, 4, 2, torch.float32)
    with torch.no_grad():
        for wrong, message in (((y, x, A, B), "1 to 16 rows"), ((y[:2], x[:2], A, B.contiguous()), "columns of B")):
            with pytest.raises(ValueError, match=message):
                add_low_rank(*wrong, 1.0, backend="cpu")
    with pytest.raises(ValueError, match=r"x \[17, 1, 5\], A \[2, 5\], B \[2, 4\] must be"):
        add_low_rank(y, x, A, B.mT, 1.0)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        add_low_rank(y, x, A, B, 1.0, backend="gpu")  # type: ignore[arg-type]

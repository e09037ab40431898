"""Causal convolution: every backend, dtype and layout of sequences against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from landmark.ctx import Bounds
from landmark.ops import conv as ops
from landmark.ops.conv import causal_conv, cpu
from landmark.ops.spans import spans

BOUNDS = {
    "dense": Bounds(2, 63),
    "long": Bounds(1, 131),
    "one token": Bounds(3, 1),
    "packed": Bounds(2, 20, ((0, 3), (3, 17), (20, 1), (21, 2), (23, 17))),
    "padded": Bounds.padded((5, 9, 2), 9),
    "idle": Bounds(2, 6, ((0, 5), (6, 0), (6, 6))),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(bounds: Bounds, channels: int, taps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(bounds.rows, bounds.width, channels), (channels, taps), (channels,)]
    shapes += [(len(bounds.sequences), taps - 1, channels)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def both_ways(leaves: list[Tensor | None], bounds: Bounds, act: str | None, backend: ops.Backend) -> list[Tensor]:
    """Outputs and gradients."""
    x, weight, bias, initial = (None if t is None else t.clone().requires_grad_() for t in leaves)
    y, last = causal_conv(x, weight, bias, bounds, initial, act, backend=backend)  # type: ignore[arg-type]
    total = (y.double() * torch.arange(y.numel()).view_as(y).sin()).sum() + last.double().cos().sum()
    wanted = [t for t in (x, weight, bias, initial) if t is not None]
    return [y, last, *torch.autograd.grad(total, wanted)]


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_against_float64(backend: ops.Backend, dtype: torch.dtype, name: str) -> None:
    bounds = BOUNDS[name]
    for channels, taps, act, has_bias, has_initial in (
        (37, 4, "silu", True, True), (16, 3, None, False, False), (5, 2, "silu", False, True),
        (33, 7, "silu", True, False), (4, 1, "silu", True, True),
    ):  # fmt: skip
        x, weight, bias, initial = inputs(bounds, channels, taps, dtype)
        leaves = [x, weight, bias if has_bias else None, initial if has_initial else None]
        if (reason := ops.why_not(backend, *leaves)) is not None:  # type: ignore[arg-type]
            pytest.skip(reason)
        want = both_ways([None if t is None else t.double() for t in leaves], bounds, act, "reference")
        got = both_ways(leaves, bounds, act, backend)
        tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
        for a, b in zip(got, want, strict=True):
            assert a.dtype == dtype and a.shape == b.shape
            if b.numel():
                assert (a.double() - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())
        assert (got[0][bounds.index() < 0] == 0).all()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_slices_of_wider_rows(backend: ops.Backend) -> None:
    bounds = Bounds(2, 9)
    x, weight, bias, _ = inputs(bounds, 20, 4)
    if (reason := ops.why_not(backend, x, weight)) is not None:
        pytest.skip(reason)
    wide = torch.randn(2, 9, 50)
    wide[..., 7:27] = x
    assert torch.equal(
        causal_conv(wide[..., 7:27], weight, bias, bounds, backend=backend)[0],
        causal_conv(x, weight, bias, bounds, backend=backend)[0],
    )


def test_gradcheck_reference() -> None:
    bounds = BOUNDS["packed"]
    leaves = [t.double().requires_grad_() for t in inputs(bounds, 3, 4)]
    assert torch.autograd.gradcheck(
        lambda x, w, b, i: causal_conv(x, w, b, bounds, i, "silu", backend="reference"), leaves
    )


def test_calls_may_be_cut_anywhere() -> None:
    bounds = Bounds(2, 12)
    x, weight, bias, _ = inputs(bounds, 20, 4)
    want, end = causal_conv(x, weight, bias, bounds, None, "silu")
    outs, state, at = [], None, 0
    for cut in (1, 2, 4, 9, 12):
        y, state = causal_conv(x[:, at:cut], weight, bias, Bounds(2, cut - at), state, "silu")
        outs.append(y)
        at = cut
    torch.testing.assert_close(torch.cat(outs, 1), want)
    assert torch.equal(state, end)


def test_the_same_bits_on_any_number_of_threads() -> None:
    bounds = Bounds(2, 100)
    leaves = inputs(bounds, 100, 4)
    if (reason := ops.why_not("cpu", *leaves)) is not None:
        pytest.skip(reason)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(both_ways(list(leaves), bounds, "silu", "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_refusals_and_fakes() -> None:
    bounds = Bounds(2, 6)
    x, weight, bias, initial = inputs(bounds, 8, 4)
    with pytest.raises(ValueError, match=r"must be \[B, T, C\] and \[C, K\]"):
        causal_conv(x, weight[:3], bias, bounds)
    with pytest.raises(ValueError, match="act is 'gelu'"):
        causal_conv(x, weight, bias, bounds, None, "gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        causal_conv(x, weight, bias, bounds, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'cpu' cannot run"):
        causal_conv(x.double(), weight.double(), None, bounds, backend="cpu")
    if ops.why_not("cpu", x, weight) is None:
        leaves = [t.requires_grad_() for t in (x, weight, bias, initial)]
        torch.use_deterministic_algorithms(False)
        torch.library.opcheck(cpu._conv.op, (*leaves, spans(bounds), True, True))

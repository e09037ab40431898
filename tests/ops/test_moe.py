"""Grouped products, rows spread to experts and answers combined: every backend against float64, poisoned with NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from landmark.ops import moe as ops
from landmark.ops.moe import Plan, combine, grouped_linear, spread

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float64: 1e-14}  # of the largest element: one rounding
BACKENDS = ["reference", "loop", "grouped_mm", "native"]
COUNTS = {
    "even": [4, 4, 4, 4],
    "uneven": [1, 0, 17, 2, 63, 3],
    "one expert": [33],
    "first and last empty": [0, 5, 0],
    "nobody": [0, 0],
    "large": [100, 50, 130, 263],
    "many": [1, 2, 0, 3, 1, 1, 0, 2] * 8,
}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def inputs(counts: list[int], width: int, out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), width, generator=g).to(dtype)
    weight = torch.randn(len(counts), out, width, generator=g).to(dtype)
    return x, weight, torch.tensor(counts)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    if want.numel():
        assert (got.double() - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


@pytest.mark.parametrize(("width", "out"), [(32, 48), (50, 22), (528, 264)])
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_linear(backend: str, dtype: torch.dtype, name: str, width: int, out: int) -> None:
    x, weight, counts = inputs(COUNTS[name], width, out, dtype)
    if (reason := ops.why_not(backend, x, weight)) is not None:
        pytest.skip(reason)
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    wide = [t.double().requires_grad_() for t in (x, weight)]
    y, want = grouped_linear(*ours, counts, backend=backend), ops.reference.grouped_linear(*wide, counts)
    assert y.dtype == dtype
    assert_close(y, want, TOLERANCE[dtype])
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(grad)
    want.backward(grad.double())
    for a, b in zip(ours, wide, strict=True):
        assert a.grad is not None and b.grad is not None and a.grad.dtype == dtype
        assert_close(a.grad, b.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
@pytest.mark.parametrize("backend", ["loop", "native"])
def test_one_gradient_only(backend: str, needed: tuple[bool, bool]) -> None:
    x, weight, counts = inputs([3, 0, 5], 32, 16, torch.float32)
    if (reason := ops.why_not(backend, x, weight)) is not None:
        pytest.skip(reason)
    for t, need in zip((x, weight), needed, strict=True):
        t.requires_grad_(need)
    grouped_linear(x, weight, counts, backend=backend).sum().backward()
    assert [t.grad is not None for t in (x, weight)] == list(needed)


def test_gradients_in_float64() -> None:
    x, weight, counts = inputs([3, 0, 2], 4, 5, torch.float64)
    run = lambda x, w: grouped_linear(x, w, counts)
    torch.autograd.gradcheck(run, (x.requires_grad_(), weight.requires_grad_()))
    torch.autograd.gradgradcheck(run, (x, weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    x, weight, counts = inputs([3, 9, 2], 32, 16, torch.float32)
    want = grouped_linear(x, weight, counts, backend="reference")
    wide = torch.cat([x, x], 1)[:, :32]
    for matrix in (weight, weight.mT.contiguous().mT):
        if ops.why_not(backend, wide, matrix) is None:
            torch.testing.assert_close(grouped_linear(wide, matrix, counts, backend=backend), want)


def test_plan() -> None:
    experts = torch.tensor([[2, 0], [1, 2], [2, 1], [0, 1]])
    plan = Plan.of(experts, 4)
    assert plan.counts.tolist() == [2, 3, 3, 0]
    assert plan.tokens.tolist() == [0, 3, 1, 2, 3, 0, 1, 2]  # sorted by expert, then by token
    for token, row in enumerate(plan.places.tolist()):
        for choice, place in enumerate(row):
            assert plan.tokens[place] == token
            start = int(plan.counts[: experts[token, choice]].sum())
            assert start <= place < start + int(plan.counts[experts[token, choice]])


def test_plan_with_dropped_choices() -> None:
    experts = torch.tensor([[2, -1], [-1, -1], [0, 2]])
    plan = Plan.of(experts, 3, dropping=True)
    assert plan.counts.tolist() == [1, 0, 2] and plan.tokens.tolist() == [2, 0, 2]
    assert plan.places.tolist() == [[1, -1], [-1, -1], [0, 2]]
    nothing = Plan.of(torch.full((3, 2), -1), 3, dropping=True)
    assert combine(torch.empty(0, 5), torch.ones(3, 2), nothing).tolist() == [[0.0] * 5] * 3


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "active", "experts", "dim"), [(13, 2, 5, 24), (1, 3, 4, 16), (65, 1, 3, 50)])
def test_spread_and_combine(
    dropping: bool, dtype: torch.dtype, tokens: int, active: int, experts: int, dim: int
) -> None:
    """The output of every token is the weighted sum of its rows; so are the gradients of all that goes in."""
    g = torch.Generator().manual_seed(2)
    chosen = torch.rand(tokens, experts, generator=g).topk(active).indices
    if dropping:
        chosen = chosen.masked_fill(torch.rand(chosen.shape, generator=g) < 0.3, -1)
    plan = Plan.of(chosen, experts, dropping=dropping)
    x, weights = torch.randn(tokens, dim, generator=g).to(dtype), torch.rand(tokens, active, generator=g)
    weights = weights.double() if dtype == torch.float64 else weights
    x.requires_grad_(), weights.requires_grad_()
    rows = spread(x, plan)
    factor = torch.arange(1, len(rows) + 1)[:, None] / 8
    out = combine((rows * factor).to(dtype), weights, plan)
    wide_x, wide_w = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    want = torch.zeros(tokens, dim, dtype=torch.float64)
    for t in range(tokens):
        for j in range(active):
            if chosen[t, j] >= 0:
                want[t] = want[t] + wide_w[t, j] * wide_x[t] * (plan.places[t, j] + 1) / 8
    assert out.dtype == dtype
    assert_close(out, want, 2 * TOLERANCE[dtype])
    grad = torch.randn(out.shape, generator=g).to(dtype)
    out.backward(grad)
    want.backward(grad.double())
    assert x.grad is not None and weights.grad is not None and wide_x.grad is not None and wide_w.grad is not None
    assert_close(x.grad, wide_x.grad, 4 * TOLERANCE[dtype])
    assert_close(weights.grad, wide_w.grad, 4 * TOLERANCE[dtype])


def test_wrong_shapes_and_backends() -> None:
    x, weight, counts = inputs([3, 2], 8, 4, torch.float32)
    with pytest.raises(ValueError, match=r"x \[5, 7\]"):
        grouped_linear(x[:, 1:], weight, counts)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        grouped_linear(x, weight, counts, backend="fast")
    with pytest.raises(ValueError, match="cannot run: it takes bfloat16"):
        grouped_linear(x, weight, counts, backend="grouped_mm")


def test_fake_tensors() -> None:
    with FakeTensorMode():
        x, weight, counts = torch.empty(5, 8), torch.empty(2, 4, 8), torch.empty(2, dtype=torch.long)
        for backend in ("loop", "native"):
            if ops.why_not(backend, x, weight) is None:
                assert grouped_linear(x, weight, counts, backend=backend).shape == (5, 4)
    with torch.device("meta"):
        assert grouped_linear(torch.empty(5, 8), torch.empty(2, 4, 8), torch.empty(2)).shape == (5, 4)

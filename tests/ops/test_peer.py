"""Product keys find what brute force finds; rows of a table are mixed as if they had been gathered."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from landmark.ops import peer as ops
from landmark.ops.peer import cpu, mix_experts, product_topk, reference


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 9), (5, 7), (16, 16), (40, 1), (40, 33), (8, 64)])
def test_equal_to_brute_force(n: int, k: int) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        queries, keys = torch.randn(7, 3, 10, dtype=torch.float64), torch.randn(2, n, 5, dtype=torch.float64)
        (scores, at), (all_scores, all_at) = product_topk(queries, keys, k), reference.product_topk(queries, keys, k)
        assert torch.equal(at, all_at) and torch.equal(scores, all_scores)


def test_equal_to_brute_force_where_scores_tie() -> None:
    """Which of equal keys are taken is open, but not what they score, and none is taken twice."""
    torch.manual_seed(0)
    queries = torch.randint(-1, 2, (50, 4)).double()
    keys = torch.randint(-1, 2, (2, 12, 2)).double()
    scores, at = product_topk(queries, keys, 20)
    assert torch.equal(scores, reference.product_topk(queries, keys, 20)[0])
    assert all(len(set(row)) == 20 for row in at.tolist())
    pairs = queries[:, None, :2] * keys[0][at // 12], queries[:, None, 2:] * keys[1][at % 12]
    assert torch.equal(pairs[0].sum(-1) + pairs[1].sum(-1), scores)


def test_scores_have_the_gradient_of_brute_force() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(6, 10, dtype=torch.float64), torch.randn(2, 9, 5, dtype=torch.float64)]
    grad, got = torch.randn(6, 8, dtype=torch.float64), []
    for search in (product_topk, reference.product_topk):
        leaves = [t.clone().requires_grad_() for t in inputs]
        got.append(torch.autograd.grad(search(*leaves, 8)[0], leaves, grad))
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b)


def inputs(dtype: torch.dtype, width: int, tokens: int = 9, m: int = 7, experts: int = 30) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x, u, v = (torch.randn(*s).to(dtype) for s in ((tokens, width), (experts, width), (experts, width)))
    return x, u, v, torch.rand(tokens, m), torch.randint(0, experts, (tokens, m))


@pytest.mark.parametrize("width", [1, 5, 16, 63, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_against_float64(backend: ops.Backend, dtype: torch.dtype, width: int) -> None:
    *floats, at = inputs(dtype, width)
    if (reason := ops.why_not(backend, floats[0], floats[1])) is not None:
        pytest.skip(reason)
    leaves = [t.clone().requires_grad_() for t in floats]
    exact = [t.double().requires_grad_() for t in floats]
    y = mix_experts(*leaves[:3], at, leaves[3], "gelu", backend=backend)
    want = mix_experts(*exact[:3], at, exact[3], "gelu", backend="reference")
    grad = torch.randn(want.shape).to(dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 3e-2
    got = [y, *torch.autograd.grad(y, leaves, grad)]
    wanted = [want, *torch.autograd.grad(want, exact, grad.double())]
    for a, b in zip(got, wanted, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())
    assert y.dtype == got[2].dtype == dtype


@torch.no_grad()
def test_gradcheck_reference() -> None:
    *floats, at = inputs(torch.float64, 5)
    with torch.enable_grad():
        leaves = [t.double().requires_grad_() for t in floats]
        assert torch.autograd.gradcheck(lambda x, u, v, w: mix_experts(x, u, v, at, w, "gelu"), leaves)


def test_the_same_bits_on_any_number_of_threads() -> None:
    *floats, at = inputs(torch.float32, 70, tokens=300, m=40, experts=50)
    if (reason := ops.why_not("cpu", floats[0], floats[1])) is not None:
        pytest.skip(reason)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in floats]
            y = mix_experts(*leaves[:3], at, leaves[3], "gelu", backend="cpu")
            results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_refusals_and_fakes() -> None:
    *floats, at = inputs(torch.float32, 8)
    with pytest.raises(ValueError, match="k is 10; it must be from 1 to the number of keys, 9"):
        product_topk(torch.randn(2, 4), torch.randn(2, 3, 2), 10)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        mix_experts(*floats[:3], at, floats[3], "gelu", backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'cpu' cannot run: it takes plain float32 and bfloat16"):
        mix_experts(*(t.double() for t in floats[:3]), at, floats[3].double(), "gelu", backend="cpu")
    if ops.why_not("cpu", floats[0], floats[1]) is None:
        torch.library.opcheck(cpu.gather_dot.op, (floats[0], floats[1], at))
        torch.library.opcheck(cpu.gather_sum.op, (floats[3], floats[1], at))

"""Cross-entropy of a linear head: every backend and chunking against the plain formula in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from landmark.ops import loss as ops
from landmark.ops.loss import cross_entropy, token_logprobs

N, D, V = 37, 24, 131
OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 5.0},
    {"scale": 0.3},
    {"z_loss": 0.01},
    {"label_smoothing": 0.1},
    {"softcap": 5.0, "scale": -0.7, "z_loss": 0.01, "label_smoothing": 0.1},
]
RUNS = [
    pytest.param(backend, dtype, id=f"{backend}-{dtype}".replace("torch.", ""))
    for backend, dtype in itertools.product(("torch", "cpu"), (torch.float64, torch.float32, torch.bfloat16))
    if (backend, dtype) != ("cpu", torch.float64)
]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(
    dtype: torch.dtype, *, n: int = N, vocab: int = V, grad: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias that `dtype` represents exactly, and targets, a third of them ignored."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(n, D), torch.randn(vocab, D), torch.randn(vocab)
    targets = torch.randint(0, vocab, (n,))
    targets[::3] = -100
    h, w, b = (t.to(dtype).requires_grad_(grad) for t in (hidden, weight, bias))
    return h, w, b, targets


def require(backend: str, hidden: Tensor) -> None:
    if (reason := ops.why_not(backend, hidden)) is not None:
        pytest.skip(f"{backend}: {reason}")


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_against_float64(backend: str, dtype: torch.dtype, chunk: int, options: dict[str, Any]) -> None:
    h, w, b, targets = problem(dtype)
    require(backend, h)
    wide = [t.detach().double().requires_grad_() for t in (h, w, b)]
    want = cross_entropy(wide[0], wide[1], targets, bias=wide[2], backend="reference", **options)
    got = cross_entropy(h, w, targets, bias=b, backend=backend, chunk=chunk, **options)
    assert got.count == want.count == (targets != -100).sum()
    for name in ("loss", "nll", "z"):
        assert_close(getattr(got, name), getattr(want, name), TOLERANCE[dtype])
    assert not got.nll.requires_grad and not got.z.requires_grad
    (want.loss / want.count).backward()
    (got.loss / got.count).backward()
    for ours, theirs in zip((h, w, b), wide, strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == dtype
        assert_close(ours.grad, theirs.grad, TOLERANCE[dtype])
    assert h.grad is not None and h.grad[targets == -100].eq(0).all()


@pytest.mark.parametrize("vocab", [1, 3, 16, 33, 1030])
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_vocabularies(backend: str, dtype: torch.dtype, vocab: int) -> None:
    h, w, _, targets = problem(dtype, vocab=vocab)
    require(backend, h)
    logits = (h.detach().double() @ w.detach().double().T).requires_grad_()
    want = F.cross_entropy(logits, targets, reduction="sum")
    got = cross_entropy(h, w, targets, backend=backend, chunk=16).loss
    assert (got - want).abs() <= TOLERANCE[dtype] * want.clamp(min=1)
    want.backward()
    got.backward()
    assert logits.grad is not None and h.grad is not None
    scale = float((w.detach().abs().sum(0)).max())
    assert (h.grad.double() - logits.grad @ w.detach().double()).abs().max() <= TOLERANCE[dtype] * scale


def test_gradcheck() -> None:
    h, w, b, targets = problem(torch.float64, n=7, vocab=11)
    for options in (OPTIONS[0], OPTIONS[-1]):
        torch.autograd.gradcheck(
            lambda h, w, b, o=options: cross_entropy(h, w, targets, bias=b, chunk=3, **o).loss, (h, w, b)
        )


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_scaled_and_repeated_backward(backend: str) -> None:
    h, w, _, targets = problem(torch.float32)
    require(backend, h)
    loss = cross_entropy(h, w, targets, backend=backend, chunk=9).loss
    one = torch.autograd.grad(loss, (h, w), retain_graph=True)
    three = torch.autograd.grad(loss * 3, (h, w), retain_graph=True)
    again = torch.autograd.grad(loss, (h, w))
    for a, b, c in zip(one, three, again, strict=True):
        torch.testing.assert_close(3 * a, b)
        assert a.equal(c)


def test_only_wanted_gradients() -> None:
    h, w, _, targets = problem(torch.float32)
    full = torch.autograd.grad(cross_entropy(h, w, targets).loss, (h, w))
    (alone,) = torch.autograd.grad(cross_entropy(h.detach(), w, targets).loss, w)
    torch.testing.assert_close(alone, full[1])
    assert not cross_entropy(h.detach(), w.detach(), targets).loss.requires_grad
    with torch.no_grad():
        assert not cross_entropy(h, w, targets).loss.requires_grad


def test_tied_weight() -> None:
    _, w, _, targets = problem(torch.float32)
    ids = torch.randint(0, V, (N,))
    got = torch.autograd.grad(cross_entropy(w[ids].tanh(), w, targets, chunk=10).loss, w)
    want = torch.autograd.grad(F.cross_entropy(w[ids].tanh() @ w.T, targets, reduction="sum"), w)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_nothing_counted(backend: str) -> None:
    h, w, _, targets = problem(torch.float32)
    require(backend, h)
    got = cross_entropy(h, w, torch.full_like(targets, -100), backend=backend)
    assert got.count == 0 and got.loss == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(got.loss, (h, w)))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_large_and_bad_logits(backend: str) -> None:
    h, w, _, targets = problem(torch.float32)
    require(backend, h)
    got = cross_entropy(h * 1e4, w, targets, backend=backend).loss
    want = F.cross_entropy((h.detach() * 1e4).double() @ w.detach().double().T, targets, reduction="sum")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    poisoned = h.detach().clone()
    poisoned[1, 0] = torch.nan
    assert cross_entropy(poisoned, w, targets, backend=backend).loss.isnan()


def test_many_small_chunks_sum_in_float32() -> None:
    torch.manual_seed(0)
    h, w = torch.randn(4096, 16).bfloat16(), torch.randn(40, 16).bfloat16().requires_grad_()
    targets = torch.randint(0, 40, (4096,))
    (want,) = torch.autograd.grad(
        cross_entropy(h.double(), w.double(), targets, backend="reference").loss, w, retain_graph=False
    )
    (got,) = torch.autograd.grad(cross_entropy(h, w, targets, chunk=16).loss, w)
    assert_close(got, want, 6e-3)


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_token_logprobs(backend: str, dtype: torch.dtype) -> None:
    h, w, b, targets = problem(dtype, grad=False)
    require(backend, h)
    options = {"bias": b, "softcap": 5.0, "scale": 0.7}
    got = token_logprobs(h, w, targets, chunk=5, backend=backend, **options)
    wide = {**options, "bias": b.double()}
    want = token_logprobs(h.double(), w.double(), targets, backend="reference", **wide)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert got[targets == -100].eq(0).all()
    assert_close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("chunk", [40, 1000])
def test_vocabulary_large_enough_for_onednn(chunk: int) -> None:
    torch.manual_seed(0)
    h, w = torch.randn(70, 64, requires_grad=True), torch.randn(33000, 64).mul_(0.1).requires_grad_()
    targets = torch.randint(0, 33000, (70,))
    want = cross_entropy(h.double(), w.double(), targets, backend="reference").loss
    got = cross_entropy(h, w, targets, chunk=chunk).loss
    assert_close(got, want, 2e-6)
    for ours, theirs in zip(torch.autograd.grad(got, (h, w)), torch.autograd.grad(want, (h, w)), strict=True):
        assert ours.is_contiguous()
        assert_close(ours, theirs, 2e-6)
    args = (h, w, targets, None, None, 1.0, 0.0, 0.0, chunk, ops.why_not("cpu", h) is None, [True, True, False])
    torch.library.opcheck(ops._cross_entropy.op, args, test_utils="test_faketensor")


def test_autocast() -> None:
    h, w, _, targets = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(h, w, targets).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert w.grad is not None and w.grad.dtype == torch.float32
    (want,) = torch.autograd.grad(cross_entropy(h.bfloat16(), w.bfloat16(), targets).loss, w)
    assert w.grad.equal(want)


def test_bad_input() -> None:
    h, w, _, targets = problem(torch.float32)
    with pytest.raises(ValueError, match=r"target 131 is outside the vocabulary of 131"):
        cross_entropy(h, w, targets.masked_fill(targets == -100, 131))
    with pytest.raises(ValueError, match=r"target -1 is outside"):
        cross_entropy(h, w, targets.masked_fill(targets == -100, -1))
    with pytest.raises(ValueError, match=r"hidden \[1, 37, 24\].*flatten"):
        cross_entropy(h[None], w, targets)
    with pytest.raises(ValueError, match=r"torch\.float32, torch\.bfloat16"):
        cross_entropy(h, w.bfloat16(), targets)
    with pytest.raises(ValueError, match=r"softcap 0\.0"):
        cross_entropy(h, w, targets, softcap=0.0)
    with pytest.raises(ValueError, match=r"label_smoothing 1\.0"):
        cross_entropy(h, w, targets, label_smoothing=1.0)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        cross_entropy(h, w, targets, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'cpu' cannot run: it takes float32 and bfloat16, not torch\.float64"):
        cross_entropy(h.double(), w.double(), targets, backend="cpu")
    with pytest.raises(ValueError, match="no gradient"):
        token_logprobs(h, w, targets)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(cross_entropy(h, w, targets).loss, h, create_graph=True)


def test_compiles() -> None:
    h, w, b, targets = problem(torch.float32)
    compiled = torch.compile(
        lambda h, w: cross_entropy(h, w, targets, chunk=8).loss * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(
        torch.autograd.grad(compiled(h, w), (h, w)),
        torch.autograd.grad(cross_entropy(h, w, targets).loss * 2, (h, w)),
    )
    grads = [True, True, True]
    args = (h, w, targets, b, None, 1.0, 0.0, 0.0, 8, ops.why_not("cpu", h) is None, grads)
    torch.library.opcheck(ops._cross_entropy.op, args, test_utils=("test_schema", "test_faketensor"))


def test_logits_never_exist_at_once() -> None:
    """No allocation is as large as half of the logits."""
    h, w = torch.randn(512, 8, requires_grad=True), torch.randn(2048, 8, requires_grad=True)
    targets = torch.randint(0, 2048, (512,))
    with torch.profiler.profile(profile_memory=True) as profile:
        cross_entropy(h, w, targets, chunk=64).loss.backward()
    largest = max(event.cpu_memory_usage for event in profile.events() if event.key == "aten::empty")
    assert 0 < largest < 512 * 2048 * 4 // 2

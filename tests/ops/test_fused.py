"""RMSNorm, gated linear units and rotary embedding: the C kernels against float64, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from landmark.ops import fused
from landmark.ops.activation import ACTIVATIONS, activation
from landmark.ops.fused import activate, cpu, glu, rms_norm, rotary

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # error over the largest element: one rounding
needs_cpu = pytest.mark.skipif(
    fused.why_not("cpu", torch.ones(1)) is not None, reason=str(fused.why_not("cpu", torch.ones(1)))
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(op: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
    """op(*tensors, backend=) and its gradients on the processor are those of the reference in float64."""
    torch.manual_seed(0)
    tensors = [(2 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    y, want = op(*tensors, backend="cpu"), op(*wide, backend="reference")
    assert y.dtype == dtype and y.shape == want.shape
    g = torch.randn(want.shape).to(dtype)
    results = torch.autograd.grad(y, tensors, g), torch.autograd.grad(want, wide, g.double())
    for a, b in zip((y, *results[0]), (want, *results[1]), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= DTYPES[dtype] * b.abs().max()


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "groups"), [(8, 1), (63, 1), (64, 2), (75, 3), (770, 1), (5000, 1)])
def test_rms_norm(width: int, groups: int, dtype: torch.dtype) -> None:
    for offset in (0.0, 1.0):
        check(
            lambda x, w, backend, o=offset: rms_norm(x, w, 1e-6, o, groups, backend=backend),
            [(5, 7, width), (width,)],
            dtype,
        )
    check(lambda x, backend: rms_norm(x, None, 1e-3, 0.0, groups, backend=backend), [(35, width)], dtype)
    check(lambda x, backend: rms_norm(x.mT, None, 1e-3, 0.0, groups, backend=backend), [(width, 4)], dtype)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_glu(act: str, dtype: torch.dtype) -> None:
    for n in (1, 3, 16, 77):
        check(lambda g, u, backend: glu(g, u, act, backend=backend), [(5, 7, n)] * 2, dtype)
        check(lambda x, backend, n=n: glu(*x.split(n, -1), act, backend=backend), [(5, 7, 2 * n)], dtype)
        check(lambda x, backend: activate(x, act, backend=backend), [(5, 7, n)], dtype)
    check(lambda x, backend: activate(x.mT, act, backend=backend), [(2, 7, 5)], dtype)
    check(lambda g, u, backend: glu(g.mT, u, act, backend=backend), [(2, 7, 5), (2, 5, 7)], dtype)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_glu_over_its_gate(dtype: torch.dtype) -> None:
    """In place it comes to the same; gate stays where a gradient is asked for or it does not lie in one piece."""
    gate, up = torch.randn(5, 77, dtype=dtype), torch.randn(5, 77, dtype=dtype)
    want, alone = glu(gate, up, "silu"), activate(gate, "silu")
    torch.testing.assert_close(glu(gate.clone(), up, "silu", inplace=True), want, rtol=0, atol=0)
    for g in (gate.clone(), gate.t().contiguous().t(), gate.clone().requires_grad_()):
        torch.testing.assert_close(activate(g, "silu", inplace=True).detach(), alone, rtol=0, atol=0)
        left = gate if g.requires_grad or not g.is_contiguous() else alone
        torch.testing.assert_close(g.detach(), left, rtol=0, atol=0)


@needs_cpu
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_far_out(act: str) -> None:
    """Values and slopes stay finite and right where exponentials overflow."""
    x = torch.tensor([-1e4, -300.0, -88.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 88.0, 300.0, 1e4], requires_grad=True)
    wide = x.detach().double().requires_grad_()
    y, want = glu(x, torch.ones_like(x), act, backend="cpu"), activation(act)(wide)
    torch.testing.assert_close(y.double(), want, rtol=2e-6, atol=2e-7)
    (g,), (h,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(want.sum(), wide)
    torch.testing.assert_close(g.double(), h, rtol=2e-6, atol=2e-6)
    assert glu(torch.tensor([torch.nan]), torch.ones(1), act, backend="cpu").isnan().all()


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool, dtype: torch.dtype) -> None:
    for width, turned, rows, transposed in itertools.product((16, 63, 200), (2, 14, 16, 200), (1, 3), (False, True)):
        angles = torch.randn(rows, 9, min(turned, width) // 2)

        def op(x: Tensor, backend: str, a: Tensor = angles, transposed: bool = transposed) -> Tensor:
            x = x.transpose(1, 2) if transposed else x
            return rotary(x, a.cos(), a.sin(), interleaved=interleaved, backend=backend)

        check(op, [(3, 4, 9, width) if transposed else (3, 9, 4, width)], dtype)


def test_rotary_keeps_relative_positions() -> None:
    """<R_m q, R_n k> depends on m - n alone (Su et al., eq. 11), in both layouts."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 5, 1, 8)
    angles = torch.arange(5.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    for interleaved in (False, True):
        turned = [rotary(t, angles.cos()[None], angles.sin()[None], interleaved=interleaved)[0, :, 0] for t in (q, k)]
        scores = turned[0] @ turned[1].T
        torch.testing.assert_close(scores.diagonal(1), scores[0, 1].expand(4))
        torch.testing.assert_close(scores.diagonal(-2), scores[2, 0].expand(3))


def test_rotary_of_learned_angles_has_gradients() -> None:
    angles = torch.randn(1, 3, 2, requires_grad=True)
    y = rotary(torch.randn(1, 3, 2, 8), angles.cos(), angles.sin())
    (g,) = torch.autograd.grad(y.square()[..., 0].sum(), angles)
    assert g[..., 0].abs().min() > 0


def test_reference_gradients() -> None:
    torch.manual_seed(0)
    x, u, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 1, 6), (2, 3, 1, 6), (6,)))
    angles = torch.randn(1, 3, 2, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6, 1.0, 2), (x, w))
    torch.autograd.gradcheck(lambda x, u: glu(x, u, "silu"), (x, u))
    torch.autograd.gradcheck(lambda x: rotary(x, angles.cos(), angles.sin()), (x,))


@needs_cpu
def test_second_derivatives() -> None:
    torch.manual_seed(0)
    x, u, w = (torch.randn(s, requires_grad=True) for s in ((2, 3, 1, 6), (2, 3, 1, 6), (6,)))
    angles = torch.randn(1, 3, 2)

    def penalty(backend: fused.Backend) -> tuple[Tensor, ...]:
        y = glu(rms_norm(x, w, 1e-6, backend=backend), u, "gelu", backend=backend)
        y = rotary(y, angles.cos(), angles.sin(), backend=backend)
        (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, u, w))

    for got, want in zip(penalty("cpu"), penalty("reference"), strict=True):
        torch.testing.assert_close(got, want)


@needs_cpu
def test_threads_share_the_work() -> None:
    """Enough rows for every thread, and gradients of the weight summed over them."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        check(lambda x, w, backend: rms_norm(x, w, 1e-6, backend=backend), [(301, 96), (96,)], torch.float32)
        check(lambda g, u, backend: glu(g, u, "silu", backend=backend), [(301, 96)] * 2, torch.float32)
    finally:
        torch.set_num_threads(before)


@needs_cpu
def test_compiles_and_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.SOURCE, "_library", None)  # as in a process that compiles before it ran any kernel
    x, w, angles = torch.randn(2, 3, 2, 8, requires_grad=True), torch.randn(8, requires_grad=True), torch.randn(1, 3, 2)

    def block(x: Tensor, w: Tensor) -> Tensor:
        return rotary(glu(rms_norm(x, w, 1e-6), x, "silu"), angles.cos(), angles.sin())

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(compiled(x, w).sum(), (x, w)), torch.autograd.grad(block(x, w).sum(), (x, w)), strict=True
    ):
        torch.testing.assert_close(got, want)
    torch.library.opcheck(torch.ops.landmark.rms_norm.default, (x, w, 1e-6, 0.0, 1))
    torch.library.opcheck(torch.ops.landmark.glu.default, (x, torch.randn_like(x), "silu"))
    torch.library.opcheck(torch.ops.landmark.rotary.default, (x, angles.cos(), angles.sin(), False, False))
    with FakeTensorMode() as mode:
        assert rms_norm(mode.from_tensor(x), mode.from_tensor(w), 1e-6).shape == x.shape


def test_bad_input() -> None:
    x = torch.randn(2, 3, 2, 8)
    with pytest.raises(ValueError, match="unknown activation 'siluu': did you mean 'silu'"):
        glu(x, x, "siluu")
    with pytest.raises(ValueError, match="one shape and dtype"):
        glu(x, x[..., :4], "silu")
    with pytest.raises(ValueError, match="groups 3 must divide the last dimension, 8"):
        rms_norm(x, None, 1e-6, groups=3)
    with pytest.raises(ValueError, match=r"weight \[4\] must be \[8\]"):
        rms_norm(x, torch.ones(4), 1e-6)
    with pytest.raises(ValueError, match=r"cos \[1, 4, 2\]"):
        rotary(x, torch.ones(1, 4, 2), torch.ones(1, 4, 2))
    with pytest.raises(ValueError, match=r"'cpu' cannot run: it takes float32 and bfloat16, not torch\.float64"):
        rms_norm(x.double(), None, 1e-6, backend="cpu")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        rms_norm(x, None, 1e-6, backend="fast")  # type: ignore[arg-type]

"""Ternary products: sums of whole numbers, so both backends agree to the bit; gradients straight through."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from landmark.ops.quant import ternary as ops
from landmark.ops.quant.ternary import (
    absmean,
    bit_linear,
    cpu,
    pack,
    quantise_tokens,
    reference,
    ternary,
    ternary_linear,
    unpack,
)

SHAPES = [(1, 5), (3, 64), (4, 63), (8, 128), (7, 200), (66, 65), (130, 1030)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN and large numbers, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def need_cpu(*tensors: Tensor | None) -> None:
    if (reason := ops.why_not("cpu", *tensors)) is not None:
        pytest.skip(reason)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The paper's equations with a straight-through estimator, in float64, by autograd."""
    x, weight = x.double(), weight.double()
    scale = weight.abs().mean()
    rounded = (weight / scale).round().clamp(-1, 1) * scale
    largest = x.abs().amax(-1, keepdim=True)
    numbers = (x * 127 / largest).round() * largest / 127
    y = (x + (numbers - x).detach()) @ (weight + (rounded - weight).detach()).mT
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("out", [1, 3, 4, 10, 64])
def test_packing_is_the_published_layout(out: int) -> None:
    weight = torch.randint(-1, 2, (out, 9), dtype=torch.int8)
    packed = pack(weight)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-out // 4), 9)
    assert torch.equal(unpack(packed, out), weight)
    if out % 4 == 0 or out < 4:
        from transformers.integrations.bitnet import pack_weights

        assert torch.equal(packed, pack_weights(weight.float()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_packed_in_one_pass(dtype: torch.dtype, out: int, width: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(out, width).to(dtype)
    need_cpu(weight)
    scale = absmean(weight)
    assert scale.dtype == torch.float32
    assert torch.equal(cpu.pack(weight, scale), pack(ternary(weight, scale)))
    halves = torch.tensor([[0.5, -0.5, 1.5, -1.5, 0.51, 0.0, -0.49, 9.0]]).to(dtype)
    assert unpack(cpu.pack(halves, torch.ones(1)), 1).tolist() == [[0, 0, 1, -1, 1, 0, 0, 1]]


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_backends_agree(dtype: torch.dtype, out: int, width: int, bias: bool, reciprocal: bool) -> None:
    torch.manual_seed(0)
    weight, b = torch.randn(out, width), torch.randn(out).to(dtype) if bias else None
    scale = absmean(weight)
    packed = pack(ternary(weight, scale))
    for rows in (1, 2, 3, 4, 5, 6, 7, 13):
        x = torch.randn(rows, width).to(dtype)
        need_cpu(x, b)
        fast, slow = (
            ternary_linear(x, packed, scale, b, out=out, reciprocal=reciprocal, backend=name)
            for name in ("cpu", "reference")
        )
        assert fast.dtype == dtype and fast.shape == (rows, out)
        if bias:  # the kernel may add the bias without rounding the product first
            torch.testing.assert_close(fast, slow, rtol=1e-6 if dtype == torch.float32 else 0.01, atol=1e-6)
        else:
            assert torch.equal(fast, slow)


def test_many_rows_on_several_threads() -> None:
    """More rows than stay near at once, strided, and the same bits whatever the threads."""
    torch.manual_seed(0)
    weight, x = torch.randn(70, 3000), torch.randn(3000, 230).mT
    scale = absmean(weight)
    packed = pack(ternary(weight, scale))
    need_cpu(x)
    want = ternary_linear(x, packed, scale, out=70, backend="reference")
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(ternary_linear(x, packed, scale, out=70, backend="cpu"), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32), ("cpu", torch.bfloat16)],
)
def test_straight_through(backend: ops.Backend, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 5, 70).to(dtype), torch.randn(34, 70).to(dtype)]
    tensors += [torch.randn(34).to(dtype)] if bias else []
    ours = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    if ops.why_not(backend, *ours) is not None:
        pytest.skip(str(ops.why_not(backend, *ours)))
    y = bit_linear(ours[0], ours[1], ours[2] if bias else None, backend=backend)
    want = plain(exact[0], exact[1], exact[2] if bias else None)
    grad = torch.randn(want.shape).to(dtype)
    got = torch.autograd.grad(y, ours, grad)
    wanted = torch.autograd.grad(want, exact, grad.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip([y, *got], [want, *wanted], strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_trained_equals_packed(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 130).to(dtype), torch.randn(21, 130).to(dtype), torch.randn(21).to(dtype)
    scale = absmean(weight)
    packed = pack(ternary(weight, scale))
    for backend in ("cpu", "reference"):
        if ops.why_not(backend, x) is None:
            want = ternary_linear(x, packed, scale, bias, out=21, backend=backend)
            assert torch.equal(bit_linear(x, weight, bias, backend=backend), want)


def test_gradient_through_packed_weights() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 70, requires_grad=True), torch.randn(8, 70)
    scale, grad = absmean(weight), torch.randn(3, 8)
    packed = pack(ternary(weight, scale))
    (want,) = torch.autograd.grad(bit_linear(x, weight), x, grad)
    (got,) = torch.autograd.grad(ternary_linear(x, packed, scale, out=8), x, grad)
    assert torch.equal(got, want)
    (got,) = torch.autograd.grad(ternary_linear(x, packed, 1 / scale, out=8, reciprocal=True), x, grad)
    torch.testing.assert_close(got, want)


def test_zeros_and_nan() -> None:
    weight = torch.randn(8, 66)
    scale = absmean(weight)
    packed = pack(ternary(weight, scale))
    x = torch.zeros(3, 66)
    x[1, 65], x[2, 3] = float("nan"), 1.0
    for backend in ("cpu", "reference"):
        if ops.why_not(backend, x) is None:
            y = ternary_linear(x, packed, scale, out=8, backend=backend)
            assert (y[0] == 0).all() and y[1].isnan().all() and y[2].isfinite().all()
    assert torch.equal(absmean(torch.zeros(4, 4)), torch.tensor([reference.LEAST]))
    assert quantise_tokens(torch.tensor([[1.0, -2.0, 0.5]]))[0].tolist() == [[64, -127, 32]]


def test_refusals_and_fakes() -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"'cpu' cannot run: it takes plain float32 and bfloat16"):
        bit_linear(x.double(), weight.double(), backend="cpu")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        bit_linear(x, weight, backend="fast")  # type: ignore[arg-type]
    torch.library.opcheck(ops._bit_linear.op, (x, weight, None, None))
    packed, scale = pack(ternary(weight, absmean(weight))), absmean(weight)
    torch.library.opcheck(ops._ternary_linear.op, (x, packed, scale, None, 4, False, None))
    meta = ternary_linear(x.to("meta"), packed.to("meta"), scale.to("meta"), out=4)
    assert meta.shape == (2, 4) and meta.is_meta

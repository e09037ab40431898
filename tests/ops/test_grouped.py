"""Weights as codes in groups: the layout, and every backend against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from landmark.ops.quant import grouped
from landmark.ops.quant.grouped import Backend, Bits, linear, quantise, reference, restore

SHAPES = [(1, 64, 5), (3, 96, 7), (8, 256, 33), (9, 130, 4), (16, 33, 64)]


def made(out: int, width: int, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(0))
    weight[0, :32] = 0
    return weight, *quantise(weight, bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_nearest_code_of_every_weight(shape: tuple[int, int, int], bits: Bits) -> None:
    _, width, out = shape
    weight, codes, scales = made(out, width, bits)
    assert codes.shape[1] == (-(-width // 128) * 64 if bits == 4 else -(-width // 64) * 64)
    assert scales.shape == (out, -(-width // 64) * 2)
    back = reference.restore(codes, scales, bits, width, torch.float32)
    step = scales.float().abs().repeat_interleave(32, 1)[:, :width]
    assert ((back - weight).abs() <= step * (0.502 if bits == 8 else 1.002)).all()  # 4 bits: one side is cut by a step
    assert torch.equal(restore(codes, scales, bits, width, torch.float32), back)
    assert torch.equal(restore(codes, scales, bits, width, torch.bfloat16), back.bfloat16())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "few", "restored"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, int, int], backend: Backend, dtype: torch.dtype, bits: Bits) -> None:
    rows, width, out = shape
    _, codes, scales = made(out, width, bits)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    bias = torch.randn(out, generator=generator).to(dtype)
    if (reason := grouped.why_not(backend, x, codes)) is not None:
        pytest.fail(reason)
    whole = reference.restore(codes, scales, bits, width, dtype).double()
    want = x.double() @ whole.mT + bias.double()
    got = linear(x, codes, scales, bias, bits, backend=backend)
    assert got.dtype == dtype
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error < (3e-6 if dtype == torch.float32 else 5e-3)


def test_a_gradient_flows_to_x() -> None:
    _, codes, scales = made(8, 64, 4)
    x = torch.randn(2, 64, requires_grad=True)
    linear(x, codes, scales, None, 4).sum().backward()
    assert x.grad is not None
    whole = reference.restore(codes, scales, 4, 64, torch.float32)
    torch.testing.assert_close(x.grad, whole.sum(0).expand(2, -1))


def test_backends_refuse() -> None:
    _, codes, scales = made(8, 64, 4)
    with pytest.raises(ValueError, match="1 to 16 rows, not 17"):
        linear(torch.zeros(17, 64), codes, scales, None, 4, backend="few")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        linear(torch.zeros(1, 64).double(), codes, scales, None, 4, backend="restored")

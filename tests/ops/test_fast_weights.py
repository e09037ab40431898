"""The pieces between the products, in C and in torch, and what the scan makes of them in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from landmark.ctx import Bounds
from landmark.ops.fast_weights import GELU, Norm, pieces
from landmark.ops.titans import neural_memory
from landmark.ops.ttt import ttt


@pytest.fixture(params=["C", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "C" and pieces.SOURCE.why_not() is not None:
        pytest.skip(f"no C kernels: {pieces.SOURCE.why_not()}")
    if request.param == "torch":
        monkeypatch.setattr(pieces, "_native", lambda x: False)
    yield request.param


@pytest.mark.parametrize("act", list(GELU))
@pytest.mark.parametrize("shape", [(3, 5), (2, 16, 33)])
def test_gelu_and_its_derivatives(backend: str, act: pieces.Act, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape, dtype=torch.float64) * 3).requires_grad_()
    y = F.gelu(x, approximate=GELU[act])
    (d,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (dd,) = torch.autograd.grad(d.sum(), x)
    for got, want in zip(pieces.gelu_slopes(x.detach().float(), act, True), (y, d, dd), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("d", [5, 16, 20, 64])
def test_the_gradient_of_a_loss_behind_a_norm(backend: str, d: int) -> None:
    torch.manual_seed(d)
    z, goal, y = torch.randn(3, 6, 3, d, dtype=torch.float64).unbind()
    gain = torch.rand(6, 1, d, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (z, goal, gain)]
    hat = F.layer_norm(z, (d,), eps=1e-6)
    (want,) = torch.autograd.grad(hat, z, goal + gain * hat, create_graph=True)
    wanted = torch.autograd.grad(want, leaves, y)
    small = [x.detach().float() for x in leaves]
    slope = pieces.loss_gradient(*small, 1e-6)
    torch.testing.assert_close(slope.g.double(), want, rtol=1e-5, atol=1e-5)
    got = pieces.loss_gradient_backward(y.float(), slope, *small[1:])
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("op", ["ttt", "titans"])
def test_gradients_in_float32(backend: str, op: str, depth: int) -> None:
    """63 tokens in three documents, heads of 20: against float64, token by token."""
    torch.manual_seed(0)
    bounds, heads, d = Bounds.of_lengths((30, 1, 32)), 2, 20
    widths = [(d, d)] if depth == 1 else [(d, 2 * d), (2 * d, d)]
    tokens = [torch.randn(1, 63, heads, d) * 0.7 for _ in range(3)]
    gates = [torch.rand(1, 63, heads) * most for most in (0.2, 0.8, 0.2)]
    weights = [torch.randn(heads, i + (op == "ttt"), o) * 0.3 for i, o in widths]
    norms = [1 + torch.randn(heads, d) * 0.2, torch.randn(heads, d) * 0.2]
    back = torch.randn(1, 63, heads, d)

    def run(dtype: torch.dtype, reference: bool) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (*tokens, *gates, *weights, *norms)]
        q, k, v, forget, persist, rate, *rest = leaves
        norm, start = Norm(rest[-2], rest[-1], 1e-6), tuple(rest[:-2])
        if op == "ttt":
            scale = (1 / torch.arange(1, 9)).to(dtype)
            y, _ = ttt(
                q, k, v, start, rate, scale, norm=norm, bounds=bounds, backend="reference" if reference else "dual"
            )
        else:
            y, _ = neural_memory(
                q, k, v, start, forget, persist, rate, chunk=8, norm=norm, bounds=bounds,
                backend="reference" if reference else "chunked",
            )  # fmt: skip
        grads = torch.autograd.grad(y, leaves, back.to(dtype), allow_unused=op == "ttt")
        return [y, *(g for g in grads if g is not None)]

    for got, want in zip(run(torch.float32, False), run(torch.float64, True), strict=True):
        assert (got.double() - want).abs().max() <= 2e-4 * want.abs().max().clamp_min(1)

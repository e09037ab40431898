"""Products of bfloat16 where the processor has none: as on such a processor, whichever this one is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from landmark.ops import linear as ops
from landmark.ops import products
from landmark.ops.linear import linear
from landmark.ops.loss import cross_entropy
from landmark.ops.quant import codes
from landmark.train.optim.muon import orthogonalise

ONE_ROUNDING = 2**-8  # of the largest element


@pytest.fixture(autouse=True, params=["native", "torch"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "EMULATED", True)
    monkeypatch.setattr(products, "PIECE", 1000)  # several pieces of each matrix
    if request.param == "torch":
        monkeypatch.setattr(products.cpu.SOURCE, "why_not", lambda: "not wanted")
    elif (reason := products.cpu.SOURCE.why_not()) is not None:
        pytest.skip(reason)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= ONE_ROUNDING * want.abs().max()


@pytest.mark.parametrize(
    "shape", [(1, 7, 3), (63, 130, 70), (200, 300, 33), (20, 64, 400), (193, 513, 129), (0, 8, 5), (5, 8, 0), (4, 0, 7)]
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_against_float64(shape: tuple[int, int, int], with_bias: bool, transposed: bool) -> None:
    m, k, n = shape
    a = drawn(k, m).mT if transposed else drawn(m, k)
    b = drawn(n, k).mT if transposed else drawn(k, n)
    bias = drawn(n) if with_bias else None
    want = a.double() @ b.double() + (0 if bias is None else bias.double())
    wide = torch.full((m, 3 * n + 1), torch.nan)
    for out in (None, torch.full((m, n), torch.nan).bfloat16(), torch.full((n, m), torch.nan).mT, wide[:, 1::3]):
        got = products.mm(a, b, bias, out)
        if m and n:
            close(got, want)
            assert got is out or out is None
        assert got.shape == (m, n)


def test_others_are_left_to_torch() -> None:
    a, b = torch.randn(4, 5), torch.randn(5, 6)
    assert torch.equal(products.mm(a, b), a @ b)
    out = torch.empty(4, 6)
    assert products.mm(a, b, torch.ones(6), out) is out and torch.equal(out, torch.addmm(torch.ones(6), a, b))
    assert products.mm(a, b, out=torch.empty(4, 6).double()).dtype == torch.float64


@pytest.mark.parametrize("rows", [(), (40,), (3, 33), (17, 2)])
def test_a_linear_map_and_its_gradients(rows: tuple[int, ...]) -> None:
    tensors = [t.requires_grad_() for t in (drawn(*rows, 70), drawn(50, 70), drawn(50))]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    assert ops.why_not("widened", *tensors) is None
    y, want = linear(*tensors, backend="widened"), F.linear(*doubles)
    close(y, want)
    g = drawn(*rows, 50)
    for got, wanted in zip(
        torch.autograd.grad(y, tensors, g), torch.autograd.grad(want, doubles, g.double()), strict=True
    ):
        close(got, wanted)


def test_it_is_picked_and_can_be_differentiated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn(64, 70).requires_grad_(), drawn(80, 70).requires_grad_()
    monkeypatch.setattr(F, "linear", None)
    (g,) = torch.autograd.grad(linear(x, weight).sin().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(g.square().sum(), weight)
    assert twice.isfinite().all() and twice.any()
    torch.library.opcheck(ops.cpu.widened.op, (x, weight, None))


def test_it_refuses_what_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"bfloat16, not torch\.float32"):
        linear(torch.randn(2, 8), torch.randn(4, 8), backend="widened")
    monkeypatch.setattr(products, "EMULATED", False)
    with pytest.raises(ValueError, match="this processor has products of bfloat16"):
        linear(drawn(2, 8), drawn(4, 8), backend="widened")


@pytest.mark.parametrize("chunk", [16, 1000])
def test_the_loss_of_a_head(chunk: int) -> None:
    hidden, weight = drawn(50, 64).requires_grad_(), drawn(300, 64).requires_grad_()
    targets = torch.randint(0, 300, (50,), generator=torch.Generator().manual_seed(0))
    loss = cross_entropy(hidden, weight, targets, chunk=chunk).loss
    grads = torch.autograd.grad(loss, (hidden, weight))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = F.cross_entropy(wide[0] @ wide[1].mT, targets, reduction="sum")
    assert abs(loss.item() - want.item()) < 2e-2 * want.item() ** 0.5
    for got, wanted in zip(grads, torch.autograd.grad(want, wide), strict=True):
        assert (got.double() - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize("bits", [4, 8, 11])
def test_restored_codes(bits: codes.Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "PIECE", 4096)
    x, weight, bias = drawn(5, 70, 96).requires_grad_(), drawn(70, 96), drawn(70)
    coded = codes.encode(weight, bits)
    exact = codes.reference.restore(*coded, bits, 70, 96, torch.float32).double()
    if codes.why_not("restored", x, coded[0], bits) is not None:
        pytest.skip("no kernels")
    y = codes.linear(x, *coded, bias, bits, 70, backend="restored")
    close(y, F.linear(x.double(), exact, bias.double()))
    (got,) = torch.autograd.grad(y, x, g := drawn(5, 70, 70))
    close(got, g.double() @ exact)


def test_muon_makes_a_matrix_orthogonal() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(40, 60, generator=torch.Generator().manual_seed(0)), 5))
    assert 0.5 < values.min() and values.max() < 1.5

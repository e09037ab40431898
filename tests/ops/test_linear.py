"""Linear maps: every backend against float64, in awkward shapes, with buffers poisoned by NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from landmark.ops import linear as ops
from landmark.ops.linear import cpu, linear, linears

BACKENDS = ["reference", "torch", "skinny", "onednn"]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float64: 1e-14}  # of the largest element: one rounding
RUNS = [
    (backend, dtype)
    for backend in BACKENDS
    for dtype in TOLERANCE
    if dtype in {"skinny": cpu.KERNELS, "onednn": (torch.float32,)}.get(backend, TOLERANCE)
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def run(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if (reason := ops.why_not(backend, x, weight, bias)) is not None:
        pytest.skip(f"{backend}: {reason}")
    return linear(x, weight, bias, backend=backend)


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out", "width"), [(1, 63), (3, 64), (17, 770), (50257, 65), (9, 5000), (3, 17000)])
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@torch.no_grad()
def test_against_float64(backend: str, dtype: torch.dtype, out: int, width: int, bias: bool) -> None:
    torch.manual_seed(0)
    weight, b = torch.randn(out, width).to(dtype), torch.randn(out).to(dtype) if bias else None
    ran = 0
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17):
        x = torch.randn(rows, width).to(dtype)
        if ops.why_not(backend, x, weight, b) is None:
            want = F.linear(x.double(), weight.double(), None if b is None else b.double())
            y = linear(x, weight, b, backend=backend)
            assert y.dtype == dtype
            twice = dtype == torch.bfloat16 and backend != "skinny"  # torch rounds before it adds the bias, and after
            assert_close(y, want, TOLERANCE[dtype] * (2 if twice else 1))
            ran += 1
    if not ran:
        pytest.skip(str(ops.why_not(backend, x[:1], weight, b)))


@pytest.mark.parametrize("dtype", cpu.KERNELS)
@pytest.mark.parametrize(("out", "width"), [(70, 256), (33, 4000), (3000, 700), (5, 17000), (9, 63)])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours_to_the_bit(out: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(*shape).to(dtype) for shape in ((out, width), (out,), (16, width)))
    alone = torch.cat([run("skinny", row[None], weight, bias) for row in x])
    for rows in range(2, 17):
        assert torch.equal(run("skinny", x[:rows], weight, bias), alone[:rows])


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_strides(backend: str) -> None:
    torch.manual_seed(0)
    wide, tall = torch.randn(40, 100), torch.randn(2, 70, 3)
    weight, bias = wide[:, 7:77], torch.randn(80)[::2]
    x = tall.mT[:, :2]  # [2, 2, 70], no unit stride
    want = x.double() @ weight.double().T + bias.double()
    assert_close(run(backend, x, weight, bias), want, 2e-6)


@pytest.mark.parametrize("backend", ["reference", "torch", "onednn"])
def test_gradients(backend: str) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(s, requires_grad=True) for s in ((2, 33, 70), (50, 70), (50,))]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    g = torch.randn(2, 33, 50)
    for got, want in zip(
        torch.autograd.grad(run(backend, *tensors), tensors, g),
        torch.autograd.grad(F.linear(*doubles), doubles, g.double()),
        strict=True,
    ):
        assert_close(got, want, 2e-6)


def test_second_derivative_onednn() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(s, requires_grad=True) for s in ((3, 4), (5, 4), (5,))]

    def penalty(backend: str) -> tuple[Tensor, ...]:
        x, weight, bias = tensors
        (g,) = torch.autograd.grad(run(backend, x, weight, bias).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), tensors)

    for got, want in zip(penalty("onednn"), penalty("torch"), strict=True):
        torch.testing.assert_close(got, want)


def test_refusals() -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8, requires_grad=True)
    with pytest.raises(ValueError, match="'skinny' cannot run: it has no gradient"):
        linear(x, weight, backend="skinny")
    with pytest.raises(ValueError, match="1 to 16 rows, not 17"):
        linear(torch.randn(17, 8), weight.detach(), backend="skinny")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        linear(x.double(), weight.detach().double(), backend="skinny")
    with pytest.raises(ValueError, match="rows are not contiguous"):
        linear(x, torch.randn(8, 4).T, backend="skinny")
    with pytest.raises(ValueError, match=r"float32, not torch\.bfloat16"):
        linear(x.bfloat16(), weight.detach().bfloat16(), backend="onednn")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        linear(x, weight, backend="fast")  # type: ignore[arg-type]


@torch.no_grad()
def test_autocast_and_no_rows_go_to_torch() -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(torch.randn(0, 8), weight).shape == (0, 4)


@torch.no_grad()
@pytest.mark.parametrize(("rows", "picked"), [(1, True), (16, True), (17, False)])
def test_picks_skinny_for_few_rows(rows: int, picked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(1, rows, 8), torch.nn.Parameter(torch.randn(4, 8))
    if (reason := ops.why_not("skinny", x[:, :1], weight)) is not None:
        pytest.skip(reason)
    calls: list[object] = []
    monkeypatch.setattr(cpu, "skinny", lambda *arguments: calls.append(arguments))
    linear(x, weight)
    assert bool(calls) == picked


def test_compiles_and_fakes() -> None:
    x, weight, bias = torch.randn(2, 8), torch.randn(4, 8), torch.randn(4)
    with torch.no_grad():
        if ops.why_not("skinny", x, weight, bias) is None:
            torch.library.opcheck(torch.ops.landmark.linear_skinny.default, (x, weight, bias))
            compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
            assert_close(compiled(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()), 2e-6)
        with FakeTensorMode() as mode:
            assert linear(mode.from_tensor(x), mode.from_tensor(weight)).shape == (2, 4)
    if cpu.ONEDNN:
        weight.requires_grad_()
        torch.library.opcheck(cpu.onednn.op, (x, weight, bias))


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_maps_in_one_call(dtype: torch.dtype, rows: int) -> None:
    x = torch.randn(rows, 200).to(dtype)
    maps = [(torch.randn(n, 200).to(dtype), torch.randn(n).to(dtype) if n == 40 else None) for n in (300, 40, 5)]
    with torch.no_grad():
        for got, (weight, bias) in zip(linears(x, maps), maps, strict=True):
            assert torch.equal(got, linear(x, weight, bias))
    wide = x.requires_grad_()
    linears(wide, maps)[0].sum().backward()
    assert wide.grad is not None

"""The selective scan: every backend, dtype and layout of sequences against float64, token by token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from landmark.ctx import Bounds
from landmark.ops import scan as ops
from landmark.ops.scan import cpu, selective_scan
from landmark.ops.spans import spans

BOUNDS = {
    "dense": Bounds(2, 63),
    "long": Bounds(1, 131),
    "one token": Bounds(3, 1),
    "packed": Bounds(2, 50, ((0, 3), (3, 46), (50, 1), (51, 2), (53, 40))),
    "padded": Bounds.padded((5, 9, 2), 9),
    "idle": Bounds(2, 6, ((0, 5), (6, 0), (6, 6))),
}
NAMES = ("x", "delta", "A", "B", "C", "D", "z", "initial")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(bounds: Bounds, channels: int, states: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = bounds.rows, bounds.width
    shapes = [(*rows, channels)] * 2 + [(channels, states)] + [(*rows, states)] * 2 + [(channels,), (*rows, channels)]
    shapes += [(len(bounds.sequences), states, channels)]
    made = {name: torch.randn(shape, generator=generator) for name, shape in zip(NAMES, shapes, strict=True)}
    made["A"] = -made["A"].exp()
    wide = torch.promote_types(dtype, torch.float32)
    return {name: t.to(wide if name in ("A", "D", "initial") else dtype) for name, t in made.items()}


def both_ways(given: dict[str, Tensor | None], bounds: Bounds, backend: ops.Backend) -> dict[str, Tensor]:
    """Outputs and gradients."""
    leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in given.items()}
    y, final = selective_scan(*(leaves[n] for n in NAMES[:7]), bounds, leaves["initial"], backend=backend)  # type: ignore[arg-type]
    total = (y.double() * torch.arange(y.numel()).view_as(y).sin()).sum() + final.double().cos().sum()
    wanted = {name: t for name, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(total, list(wanted.values()))
    return {"y": y, "final": final} | dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_against_float64(backend: ops.Backend, dtype: torch.dtype, name: str) -> None:
    bounds = BOUNDS[name]
    for channels, states, without in ((37, 16, ()), (5, 3, ("z",)), (16, 20, ("initial",))):
        given: dict[str, Tensor | None] = inputs(bounds, channels, states, dtype) | dict.fromkeys(without)  # type: ignore[assignment]
        if (reason := ops.why_not(backend, given["x"], states=states)) is not None:  # type: ignore[arg-type]
            pytest.skip(reason)
        exact = {n: None if t is None else t.double() for n, t in given.items()}
        want, got = both_ways(exact, bounds, "reference"), both_ways(given, bounds, backend)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        for n, b in want.items():
            assert got[n].dtype == (dtype if n in ("y", "x") else got[n].dtype) and got[n].shape == b.shape
            error = (got[n].double() - b).abs().max().item()
            assert error <= tolerance * max(1.0, b.abs().max().item()), (n, error)
        assert (got["y"][bounds.index() < 0] == 0).all()


def test_gradcheck_reference() -> None:
    bounds = Bounds(1, 7, ((0, 3), (3, 4)))
    given = [t.requires_grad_() for t in inputs(bounds, 3, 2, torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t[:7], bounds, t[7], backend="reference"), given)


@pytest.mark.parametrize("delta", [-90.0, -20.0, 0.0, 19.0, 80.0])
def test_extreme_steps(delta: float) -> None:
    """softplus at its ends, and states that are forgotten at once or never."""
    bounds = Bounds(1, 40)
    given = inputs(bounds, 20, 16)
    given["delta"] = given["delta"] + delta
    want = both_ways({n: t.double() for n, t in given.items()}, bounds, "reference")
    for backend in ("chunked", "cpu"):
        if ops.why_not(backend, given["x"]) is None:  # type: ignore[arg-type]
            got = both_ways(dict(given), bounds, backend)  # type: ignore[arg-type]
            for n, b in want.items():
                assert (got[n].double() - b).abs().max() <= 2e-5 * max(1.0, b.abs().max().item()), n


def test_calls_may_be_cut_anywhere() -> None:
    bounds = Bounds(2, 40)
    given = inputs(bounds, 20, 16)
    rows = ("x", "delta", "B", "C", "z")
    want, end = selective_scan(*(given[n] for n in NAMES[:7]), bounds)
    outs, state, at = [], None, 0
    for cut in (1, 2, 4, 33, 40):
        part = given | {n: given[n][:, at:cut] for n in rows}
        y, state = selective_scan(*(part[n] for n in NAMES[:7]), Bounds(2, cut - at), state)
        outs.append(y)
        at = cut
    torch.testing.assert_close(torch.cat(outs, 1), want)
    torch.testing.assert_close(state, end)


def test_the_same_bits_on_any_number_of_threads() -> None:
    bounds = Bounds(2, 100)
    given = inputs(bounds, 300, 16)
    if (reason := ops.why_not("cpu", given["x"])) is not None:
        pytest.skip(reason)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(both_ways(dict(given), bounds, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, other[n]) for n, a in results[0].items())


def test_refusals_and_fakes() -> None:
    bounds = Bounds(2, 6)
    given = inputs(bounds, 8, 4)
    args = [given[n] for n in NAMES[:7]]
    with pytest.raises(ValueError, match=r"A \[7, 4\].*must be twice \[B, T, C\], \[C, N\]"):
        selective_scan(args[0], args[1], args[2][:7], *args[3:], bounds)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        selective_scan(*args, bounds, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'cpu' cannot run"):
        selective_scan(*(t.double() for t in args), bounds, backend="cpu")
    if ops.why_not("cpu", given["x"], states=4) is None:
        torch.use_deterministic_algorithms(False)
        x, delta, A, B, C, D, z = (t.requires_grad_() for t in args)
        flat = A.detach().mT.contiguous().requires_grad_()
        torch.library.opcheck(
            cpu._scan.op, (x, delta, z, B, C, flat, D, given["initial"], spans(bounds), True, 2),
        )  # fmt: skip

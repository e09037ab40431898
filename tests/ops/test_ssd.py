"""State space duality: the recurrence, masked attention and the chunks are one map, both ways, for any layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from landmark.ctx import Bounds
from landmark.ops import ssd as ops
from landmark.ops.spans import spans
from landmark.ops.ssd import cpu, ssd

BOUNDS = {
    "dense": Bounds(2, 63),
    "even": Bounds(2, 64),
    "one token": Bounds(3, 1),
    "packed": Bounds(2, 50, ((0, 3), (3, 46), (50, 1), (51, 2), (53, 40))),
    "padded": Bounds.padded((5, 9, 2), 9),
    "idle": Bounds(2, 6, ((0, 5), (6, 0), (6, 6))),
}
NAMES = ("x", "dt", "A", "B", "C", "D", "initial")
SHAPES = {"plain": (3, 5, 1, 7), "groups": (6, 4, 2, 3), "a group each": (2, 16, 2, 16)}  # heads, width, groups, states
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that nothing writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(bounds: Bounds, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads, width, groups, states = shape
    rows = bounds.rows, bounds.width
    shapes = [(*rows, heads, width), (*rows, heads), (heads,), *[(*rows, groups, states)] * 2, (heads,)]
    shapes += [(len(bounds.sequences), groups, states, heads // groups * width)]
    made = {name: torch.randn(s, generator=generator) for name, s in zip(NAMES, shapes, strict=True)}
    made["A"], made["dt"] = -made["A"].exp(), torch.nn.functional.softplus(made["dt"] - 1)
    wide = torch.promote_types(dtype, torch.float32)
    return {name: t.to(dtype if name in "xBC" else wide) for name, t in made.items()}


def both_ways(given: dict[str, Tensor | None], bounds: Bounds, backend: ops.Backend, chunk: int) -> dict[str, Tensor]:
    """Outputs and gradients."""
    leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in given.items()}
    y, final = ssd(*(leaves[n] for n in NAMES[:6]), bounds, leaves["initial"], backend=backend, chunk=chunk)  # type: ignore[arg-type]
    total = (y.double() * torch.arange(y.numel()).view_as(y).sin()).sum() + final.double().cos().sum()
    wanted = {name: t for name, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(total, list(wanted.values()))
    return {"y": y, "final": final} | dict(zip(wanted, grads, strict=True))


def check(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """The error of a sum over all tokens (A) is measured by the size of its terms, which are of either sign."""
    for name, b in want.items():
        error, size = (got[name].double() - b).abs().max().item(), b.abs().max().item()
        size = max(1.0, size, want["dt"].abs().sum((0, 1)).max().item() if name == "A" else 0.0)
        assert got[name].shape == b.shape and error <= tolerance * size, (name, error, size)


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_three_forms_are_one(shape: str, name: str) -> None:
    bounds = BOUNDS[name]
    given = inputs(bounds, SHAPES[shape], torch.float64)
    for some in (given, given | {"initial": None}):
        want = both_ways(some, bounds, "reference", 1)  # type: ignore[arg-type]
        check(both_ways(some, bounds, "quadratic", 1), want, 1e-12)  # type: ignore[arg-type]
        for chunk in (1, 4, 16, 1000):
            got = both_ways(some, bounds, "chunked", chunk)  # type: ignore[arg-type]
            check(got, want, 1e-12)
            assert (got["y"][bounds.index() < 0] == 0).all()


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_chunks_against_float64(backend: ops.Backend, dtype: torch.dtype, name: str) -> None:
    bounds = BOUNDS[name]
    for shape in (*SHAPES.values(), (3, 40, 1, 33), (24, 8, 3, 5)):
        given = inputs(bounds, shape, dtype)
        if (reason := ops.why_not(backend, *(given[n] for n in NAMES[:6]), bounds)) is not None:
            pytest.skip(reason)
        for some in (given, given | {"initial": None}):
            exact = {n: None if t is None else t.double() for n, t in some.items()}
            want = both_ways(exact, bounds, "reference", 1)  # type: ignore[arg-type]
            for chunk in (16, 19, 1000):
                got = both_ways(some, bounds, backend, chunk)  # type: ignore[arg-type]
                check(got, want, 1e-5 if dtype == torch.float32 else 4e-2)
                assert got["y"].dtype == got["B"].dtype == dtype and got["final"].dtype == torch.float32
                assert (got["y"][bounds.index() < 0] == 0).all()


@pytest.mark.parametrize("shape", [*SHAPES.values(), (4, 40, 1, 9), (24, 64, 3, 5)])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_one_token_against_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    bounds = Bounds(3, 1)
    given = inputs(bounds, shape, dtype)
    args = [given[n] for n in NAMES[:6]]
    if (reason := ops.why_not("step", *args, bounds)) is not None:
        pytest.skip(reason)
    for initial in (given["initial"], None):
        exact = None if initial is None else initial.double()
        want = ssd(*(t.double() for t in args), bounds, exact, backend="reference")
        got = ssd(*args, bounds, initial, backend="step")
        for a, b in zip(got, want, strict=True):
            tolerance = 1e-2 if a.dtype == torch.bfloat16 else 2e-6
            assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


def test_gradcheck() -> None:
    bounds = Bounds(1, 7, ((0, 3), (3, 4)))
    given = [t.requires_grad_() for t in inputs(bounds, (2, 2, 1, 3), torch.float64).values()]
    for backend in ("reference", "quadratic", "chunked"):
        assert torch.autograd.gradcheck(lambda *t, b=backend: ssd(*t[:6], bounds, t[6], backend=b, chunk=2), given)


def test_strong_decays_stay_exact() -> None:
    """Neighbours see each other rightly where sums over a chunk are large, which differences of rounded sums do not."""
    bounds = Bounds(1, 128)
    given = inputs(bounds, (2, 4, 1, 4))
    given["dt"], given["A"] = torch.full_like(given["dt"], 0.5), torch.tensor([-60.0, -1e-4])
    given["dt"][:, 100:] = 1e-3
    want = both_ways({n: t.double() for n, t in given.items()}, bounds, "reference", 1)
    for backend in ("chunked", "cpu"):
        if ops.why_not(backend, *(given[n] for n in NAMES[:6]), bounds) is None:  # type: ignore[arg-type]
            check(both_ways(dict(given), bounds, backend, 128), want, 5e-6)  # type: ignore[arg-type]


def test_slices_of_wider_rows() -> None:
    bounds = Bounds(2, 9)
    given = inputs(bounds, (4, 8, 2, 5))
    row = torch.cat([torch.ones(2, 9, 3), *(given[n].flatten(2) for n in "xBC")], -1)
    x, B, C = row[..., 3:].split([32, 10, 10], -1)
    apart = given | {"x": x.unflatten(-1, (4, 8)), "B": B.unflatten(-1, (2, 5)), "C": C.unflatten(-1, (2, 5))}
    assert torch.equal(*(ssd(*(g[n] for n in NAMES[:6]), bounds)[0] for g in (given, apart)))


def test_the_same_bits_on_any_number_of_threads() -> None:
    bounds = Bounds(2, 100)
    given = inputs(bounds, (24, 16, 1, 16))
    if (reason := ops.why_not("cpu", *(given[n] for n in NAMES[:6]), bounds)) is not None:
        pytest.skip(reason)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(both_ways(dict(given), bounds, "cpu", 32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, other[n]) for n, a in results[0].items())


def test_calls_may_be_cut_anywhere() -> None:
    bounds = Bounds(2, 40)
    given = inputs(bounds, (6, 16, 2, 8))
    want, end = ssd(*(given[n] for n in NAMES[:6]), bounds)
    outs, state, at = [], None, 0
    for cut in (1, 2, 4, 33, 40):
        part = given | {n: given[n][:, at:cut] for n in ("x", "dt", "B", "C")}
        y, state = ssd(*(part[n] for n in NAMES[:6]), Bounds(2, cut - at), state)
        outs.append(y)
        at = cut
    torch.testing.assert_close(torch.cat(outs, 1), want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(state, end, atol=2e-5, rtol=1e-4)


def test_refusals_and_fakes() -> None:
    bounds = Bounds(2, 1)
    given = inputs(bounds, (4, 4, 2, 4))
    args = [given[n] for n in NAMES[:6]]
    with pytest.raises(ValueError, match="where G divides H"):
        ssd(args[0][:, :, :3], args[1][:, :, :3], args[2][:3], *args[3:], bounds)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        ssd(*args, bounds, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="it has no gradient"):
        ssd(args[0].clone().requires_grad_(), *args[1:], bounds, backend="step")
    with pytest.raises(ValueError, match="it takes one token of each sequence"):
        ssd(*args, Bounds(1, 2), backend="step")
    with pytest.raises(ValueError, match="'cpu' cannot run: it takes plain tensors"):
        ssd(*(t.double() for t in args), bounds, backend="cpu")
    if ops.why_not("cpu", *args, bounds) is None:
        torch.use_deterministic_algorithms(False)
        x, dt, A, B, C, D = args
        torch.library.opcheck(
            torch.ops.landmark.ssd_step.default, (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, given["initial"])
        )
        x, B, C, dt, A, D, initial = (t.requires_grad_() for t in (x, B, C, dt, A, D, given["initial"]))
        torch.library.opcheck(cpu._ssd.op, (x, B, C, dt, A, D, initial, spans(bounds), True, 1, 2))

"""What RWKV is made of - token shift, WKV, the delta rule: every backend, dtype and layout against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from landmark.ctx import Bounds
from landmark.ops import delta, shift, wkv
from landmark.ops.native import Unavailable

BOUNDS = {
    "dense": Bounds(2, 63),
    "long": Bounds(1, 131),
    "one token": Bounds(3, 1),
    "packed": Bounds(2, 50, ((0, 3), (3, 46), (50, 1), (51, 2), (53, 40))),
    "padded": Bounds.padded((5, 9, 2), 9),
    "idle": Bounds(2, 6, ((0, 5), (6, 0), (6, 6))),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
Given = dict[str, Tensor]
Run = Callable[[Given, Bounds, str | None], list[Tensor]]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def shift_inputs(bounds: Bounds, draw: Callable[..., Tensor]) -> Given:
    n = len(bounds.sequences)
    return {"x": draw(bounds.rows, bounds.width, 37), "mix": draw(3, 37), "initial": draw(n, 37)}


def run_shift(g: Given, bounds: Bounds, backend: str | None) -> list[Tensor]:
    ys, last = shift.token_mix(g["x"], g["mix"], bounds, g.get("initial"), backend=backend)  # type: ignore[arg-type]
    return [*ys, last]


def wkv_inputs(bounds: Bounds, draw: Callable[..., Tensor]) -> Given:
    shape, n = (bounds.rows, bounds.width, 37), len(bounds.sequences)
    state = torch.stack([draw(n, 37), draw(n, 37).exp(), draw(n, 37)], 1)
    state[0] = 0  # has seen nothing
    return {"k": 3 * draw(*shape), "v": draw(*shape), "w": -draw(37).exp(), "u": draw(37), "initial": state}


def run_wkv(g: Given, bounds: Bounds, backend: str | None) -> list[Tensor]:
    y, state = wkv.wkv(g["k"], g["v"], g["w"], g["u"], bounds, g.get("initial"), backend=backend)  # type: ignore[arg-type]
    return [y, state[:, :2], state[:, 2].detach()]


def decayed_inputs(bounds: Bounds, draw: Callable[..., Tensor], heads: int = 3, width: int = 16) -> Given:
    shape, n = (bounds.rows, bounds.width, heads, width), len(bounds.sequences)
    given = {name: draw(*shape) for name in "rkv"}
    given["w"] = -(3 * draw(*shape)).exp()  # from almost none to forgetting all at once
    return given | {"initial": draw(n, heads, width, width)}


def delta_inputs(bounds: Bounds, draw: Callable[..., Tensor], heads: int = 3, width: int = 16) -> Given:
    given = decayed_inputs(bounds, draw, heads, width)
    key, rate = F.normalize(draw(*given["r"].shape), dim=-1), draw(*given["r"].shape).sigmoid()
    return given | {"a": -key, "b": key * rate}


def run_delta(g: Given, bounds: Bounds, backend: str | None) -> list[Tensor]:
    more = {"a": g.get("a"), "b": g.get("b"), "backend": backend}
    y, state = delta.delta_rule(g["r"], g["w"], g["k"], g["v"], bounds, g.get("initial"), **more)  # type: ignore[arg-type]
    return [y, state]


OPS: dict[str, tuple[Callable[..., Given], Run]] = {
    "shift": (shift_inputs, run_shift),
    "wkv": (wkv_inputs, run_wkv),
    "decay": (decayed_inputs, run_delta),
    "delta": (delta_inputs, run_delta),
}
WIDE = {"w", "u", "mix", "initial"}  # never rounded to bfloat16


def draw(dtype: torch.dtype = torch.float64) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def both_ways(run: Run, given: Given, bounds: Bounds, backend: str | None) -> dict[str, Tensor]:
    """Outputs and gradients."""
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    outs = run(leaves, bounds, backend)
    total = sum((y.double() * torch.arange(y.numel()).view_as(y).add(n).sin()).sum() for n, y in enumerate(outs))
    assert isinstance(total, Tensor)
    grads = torch.autograd.grad(total, list(leaves.values()))
    return {f"out{n}": y for n, y in enumerate(outs)} | dict(zip(leaves, grads, strict=True))


def compare(have: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, true in want.items():
        if name == "initial" and true.shape[1:2] == (3,) and true.ndim == 3:
            true, have[name] = true[1:, :2], have[name][1:, :2]  # what saw nothing has no unit that others would share
        if true.numel():
            error, scale = (have[name].double() - true).abs().max().item(), true.abs().max().item()
            assert error <= tolerance * (scale + 0.1), f"{name}: {error:.2e} of {scale:.2f}"


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ["chunked", "cpu"])
@pytest.mark.parametrize("op", OPS)
def test_against_float64(op: str, backend: str, dtype: torch.dtype, name: str) -> None:
    if backend == "cpu" and dtype == torch.float64:
        backend = "reference"  # which then is compared with itself in two precisions of input
    if op == "shift" and backend == "chunked":
        backend = "reference"
    make, run = OPS[op]
    given = make(BOUNDS[name], draw())
    rounded = {n: t.to(torch.promote_types(dtype, torch.float32) if n in WIDE else dtype) for n, t in given.items()}
    want = both_ways(run, {n: t.double() for n, t in rounded.items()}, BOUNDS[name], "reference")
    compare(both_ways(run, rounded, BOUNDS[name], backend), want, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("op", ["wkv", "decay", "delta"])
def test_gradients(op: str, backend: str) -> None:
    """Of the plain equations themselves, by differences."""
    bounds, (make, run) = Bounds(1, 7, ((0, 4), (4, 3))), OPS[op]
    given = make(bounds, draw()) if op == "wkv" else make(bounds, draw(), 1, 3)  # type: ignore[call-arg]
    if op == "wkv":
        given = {n: t[..., :2].contiguous() for n, t in given.items()}
    given.pop("initial")
    names = list(given)

    def f(*values: Tensor) -> Tensor:
        return run(dict(zip(names, values, strict=True)), bounds, backend)[0]

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in given.values()])


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("op", ["decay", "delta"])
def test_widths_and_threads(op: str, width: int) -> None:
    bounds, (make, run) = Bounds(2, 40), OPS[op]
    given = make(bounds, draw(torch.float32), 2, width)  # type: ignore[call-arg]
    want = both_ways(run, {n: t.double() for n, t in given.items()}, bounds, "reference")
    one = both_ways(run, given, bounds, "cpu")
    compare(one, want, 2e-5)
    torch.set_num_threads(2)
    try:
        two = both_ways(run, given, bounds, "cpu")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one[n], two[n]) for n in one), "the number of threads changes nothing"


@pytest.mark.parametrize("op", OPS)
def test_pieces_equal_the_whole(op: str) -> None:
    """The state after one call is where the next one goes on; a sequence of no tokens leaves it as it was."""
    make, run = OPS[op]
    given = make(Bounds(2, 40), draw(torch.float32))
    start = given.pop("initial")
    whole = run({**given, "initial": start}, Bounds(2, 40), None)
    pieces, state = [], start
    for a, b in ((0, 1), (1, 18), (18, 19), (19, 40)):
        part = {n: t[:, a:b] if t.shape[:2] == (2, 40) else t for n, t in given.items()}
        *ys, state = run({**part, "initial": state}, Bounds(2, b - a), None)
        if op == "wkv":
            state = torch.cat([ys.pop(), state[:, None]], 1)
        pieces.append(ys)
    for n, parts in enumerate(zip(*pieces, strict=True)):
        torch.testing.assert_close(torch.cat(parts, 1), whole[n], rtol=1e-5, atol=1e-5)
    empty = {n: t[:, :1] if t.shape[:2] == (2, 40) else t for n, t in given.items()} | {"initial": start}
    *_, after = run(empty, Bounds(2, 1, ((0, 0), (1, 0))), None)
    torch.testing.assert_close(after, start[:, 2] if op == "wkv" else start)


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_no_exponent_overflows(backend: wkv.Backend) -> None:
    """The largest key wins, however large; gradients stay numbers."""
    k = torch.zeros(1, 40, 16)
    k[:, 11], k[:, 30] = 1e4, -1e4
    k.requires_grad_()
    v, w, u = torch.arange(40.0)[None, :, None].expand(1, 40, 16).contiguous(), -torch.ones(16), torch.zeros(16)
    y, state = wkv.wkv(k, v, w, u, Bounds(1, 40), backend=backend)
    torch.testing.assert_close(y[0, 11:, 0], torch.full((29,), 11.0))
    y.sum().backward()
    assert k.grad is not None and k.grad.isfinite().all() and state.isfinite().all()


def test_delta_rule_replaces_what_is_stored() -> None:
    """With a = -k, b = k and no decay, the value under a key is replaced by the new one (2503.14456, sec. 3)."""
    key = F.normalize(draw(torch.float32)(1, 1, 1, 16), dim=-1).expand(1, 3, 1, 16)
    v = draw(torch.float32)(1, 3, 1, 16)
    y, _ = delta.delta_rule(key, torch.zeros_like(v), key, v, Bounds(1, 3), a=-key, b=key)
    torch.testing.assert_close(y, v)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> str:
        raise Unavailable("LANDMARK_NATIVE=0")

    for op, (make, run) in OPS.items():
        module = {"shift": shift, "wkv": wkv}.get(op, delta)
        monkeypatch.setattr(module.cpu, "why_not", lambda *_: "LANDMARK_NATIVE=0")
        monkeypatch.setattr(module.cpu, "_kernel", none)
        given = make(BOUNDS["packed"], draw(torch.float32))
        want = both_ways(run, given, BOUNDS["packed"], "reference")
        compare(both_ways(run, given, BOUNDS["packed"], None), want, 1e-5)


def test_bad_input() -> None:
    x, bounds = torch.zeros(1, 3, 8), Bounds(1, 3)
    with pytest.raises(ValueError, match="must be \\[B, T, C\\] and \\[n, C\\]"):
        shift.token_mix(x, torch.zeros(8), bounds)
    with pytest.raises(ValueError, match="twice \\[B, T, C\\] and twice \\[C\\]"):
        wkv.wkv(x, x, torch.zeros(7), torch.zeros(8), bounds)
    h = x.view(1, 3, 2, 4)
    with pytest.raises(ValueError, match="give both or none"):
        delta.delta_rule(h, h, h, h, bounds, a=h)
    with pytest.raises(ValueError, match="all must be \\[B, T, H, N\\]"):
        delta.delta_rule(h, h, h[:, 1:], h, bounds)
    with pytest.raises(ValueError, match="heads as wide as a multiple of 16"):
        delta.delta_rule(h, h, h, h, bounds, backend="cpu")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        delta.why_not("cuda", h)  # type: ignore[arg-type]

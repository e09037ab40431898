"""TTT: the dual form is the primal form, both ways; mini-batches do not depend on calls; linear attention is inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from landmark.ctx import Bounds
from landmark.ops.fast_weights import Memory
from landmark.ops.ttt import Norm, ttt

HEADS, D = 2, 4
BOUNDS = {
    "dense": Bounds(2, 8),
    "uneven": Bounds(2, 11),
    "packed": Bounds(2, 10, ((0, 3), (3, 7), (10, 1), (11, 9))),
    "padded": Bounds.padded((5, 9, 2), 9),
    "idle": Bounds(2, 6, ((0, 5), (6, 0), (6, 6))),
}


def arguments(bounds: Bounds, kind: str, batch: int = 4, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    torch.manual_seed(0)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * std).to(dtype)

    sizes = [(D + 1, D)] if kind.startswith("linear") else [(D + 1, 3 * D), (3 * D + 1, D)]
    bare = kind.endswith("bare")
    norm = None if bare else Norm(1 + draw(HEADS, D, std=0.2), draw(HEADS, D, std=0.2), 1e-6)
    return {
        **{name: draw(bounds.rows, bounds.width, HEADS, D) for name in "qkv"},
        "weights": tuple(draw(HEADS, i - bare, o, std=0.4) for i, o in sizes),
        "rate": torch.rand(bounds.rows, bounds.width, HEADS, dtype=torch.float64).to(dtype) * 0.5,
        "scale": (1 / torch.arange(1, batch + 1, dtype=torch.float64)).to(dtype),
        "norm": norm,
        "bounds": bounds,
    }


def inside(bounds: Bounds) -> Tensor:
    return bounds.index() >= 0


def close(a: Memory, b: Memory, **tolerance: Any) -> None:
    for part, other in zip(a, b, strict=True):
        for x, y in zip(part, other, strict=True):
            torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("kind", ["linear", "linear bare", "mlp", "mlp bare"])
@pytest.mark.parametrize("name", BOUNDS)
def test_the_dual_form_is_the_primal_form(name: str, kind: str) -> None:
    given = arguments(BOUNDS[name], kind)
    want, state = ttt(**given, backend="reference")
    got, other = ttt(**given)
    torch.testing.assert_close(got, want)
    close(other, state)
    assert (got[~inside(BOUNDS[name])] == 0).all()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_they_have_the_same_gradients(kind: str, act: str) -> None:
    bounds = BOUNDS["packed"]
    given = arguments(bounds, kind)
    leaves = [*(given[name] for name in "qkv"), *given["weights"], given["rate"], given["scale"], *given["norm"][:2]]
    for leaf in leaves:
        leaf.requires_grad_()
    back = torch.randn(bounds.rows, bounds.width, HEADS, D, dtype=torch.float64)
    results = []
    for backend in ("reference", "dual"):
        y, state = ttt(**given, act=act, backend=backend)
        total = (y * back).sum() + sum(w.sin().sum() for part in (state.now, state.momentum) for w in part)
        results.append(torch.autograd.grad(total, leaves))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_gradients_of_the_dual_form_are_numerically_right(kind: str) -> None:
    given = arguments(Bounds(1, 5), kind, batch=3)
    names = ["q", "k", "v", "rate", "scale"]

    def run(*tensors: Tensor) -> Tensor:
        count = len(given["weights"])
        norm = Norm(tensors[-2], tensors[-1], 1e-6)
        filled = dict(zip(names, tensors, strict=False)) | {"weights": tensors[5 : 5 + count], "norm": norm}
        return ttt(**{**given, **filled})[0]

    inputs = [given[name] for name in names] + [*given["weights"], *given["norm"][:2]]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])


def part(given: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    bounds = given["bounds"]
    some = {name: given[name][:, start:end] for name in ("q", "k", "v", "rate")}
    return {**given, **some, "bounds": Bounds(bounds.rows, end - start)}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("cuts", [(3, 4, 5, 10), tuple(range(1, 11)), (4, 8)])
def test_calls_may_be_cut_anywhere(kind: str, cuts: tuple[int, ...]) -> None:
    given = arguments(BOUNDS["uneven"], kind)
    want, final = ttt(**given)
    state, outs, seen = None, [], 0
    for end in (*cuts, 11):
        before = () if state is None else (seen, seen)
        y, state = ttt(**part(given, seen, end), initial=state, before=before)
        outs.append(y)
        seen = end
    torch.testing.assert_close(torch.cat(outs, 1), want)
    close(state, final)


def test_slots_may_stand_at_different_places() -> None:
    """Ragged first calls, then one token each, then a ragged call: as each sequence alone."""
    full = arguments(Bounds(2, 11), "mlp")
    want, _ = ttt(**full)
    packed = {**full, "bounds": Bounds.of_lengths((6, 3))}
    for name in ("q", "k", "v", "rate"):
        packed[name] = torch.cat([full[name][0, :6], full[name][1, :3]])[None]
    y, state = ttt(**packed)
    torch.testing.assert_close(y[0], torch.cat([want[0, :6], want[1, :3]]))
    for extra in range(2):
        at = (6 + extra, 3 + extra)
        one = {name: torch.stack([full[name][i, t] for i, t in enumerate(at)])[:, None] for name in "qkv"}
        one["rate"] = torch.stack([full["rate"][i, t] for i, t in enumerate(at)])[:, None]
        args = {**full, **one, "bounds": Bounds(2, 1), "initial": state, "before": at}
        want_here, other = ttt(**args, backend="reference")
        y, state = ttt(**args)
        torch.testing.assert_close(y, want_here)
        close(state, other)
        torch.testing.assert_close(y[:, 0], torch.stack([want[i, t] for i, t in enumerate(at)]))
    for name in ("q", "k", "v", "rate"):
        packed[name] = torch.cat([full[name][0, 8:], full[name][1, 5:]])[None]
    y, _ = ttt(**{**packed, "bounds": Bounds.of_lengths((3, 6))}, initial=state, before=(8, 5))
    torch.testing.assert_close(y[0], torch.cat([want[0, 8:], want[1, 5:]]))


def test_batch_gradient_descent_on_a_linear_model_is_linear_attention() -> None:
    """Theorem 1: f(x) = W x, W_0 = 0, one mini-batch, eta = 1/2 on |W k - v|^2."""
    q, k, v = torch.randn(3, 2, 9, HEADS, D, dtype=torch.float64).unbind()
    eta = 0.5
    start = (torch.zeros(HEADS, D, D, dtype=torch.float64),)
    rate = torch.full((2, 9, HEADS), 2 * eta, dtype=torch.float64)  # our loss is half of the theorem's
    y, _ = ttt(q, k, v, start, rate, torch.ones(9, dtype=torch.float64), bounds=Bounds(2, 9))
    scores = torch.einsum("bthd,bshd->bhts", q, k).tril()
    torch.testing.assert_close(y, torch.einsum("bhts,bshd->bthd", scores, v), rtol=1e-12, atol=1e-12)
    smaller, _ = ttt(q, k, v, start, rate, torch.ones(3, dtype=torch.float64), bounds=Bounds(2, 9))
    assert (smaller - y).abs().max() > 0.1  # online steps are another thing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    given = arguments(BOUNDS["packed"], "mlp", dtype=dtype)
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}
    exact["weights"] = tuple(w.double() for w in given["weights"])
    exact["norm"] = Norm(given["norm"].weight.double(), given["norm"].bias.double(), 1e-6)
    y, state = ttt(**given)
    want, _ = ttt(**exact, backend="reference")
    assert y.dtype == dtype and state.now[0].dtype == torch.float32
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)


def test_what_it_refuses() -> None:
    given = arguments(Bounds(1, 3), "linear")
    with pytest.raises(ValueError, match="'step' cannot run"):
        ttt(**given, backend="step")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        ttt(**given, backend="fast")
    with pytest.raises(ValueError, match=r"takes 7 inputs"):
        ttt(**{**given, "weights": (torch.zeros(HEADS, 7, D),)})
    with pytest.raises(ValueError, match="0 lengths for 1 sequences"):
        ttt(**given, initial=Memory.start(given["weights"], 1))

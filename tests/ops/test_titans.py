"""Neural memory: chunks equal the paper's recurrence written out, forwards and backwards, however calls are cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from landmark.ctx import Bounds
from landmark.ops.fast_weights import Memory, Net, Norm
from landmark.ops.titans import neural_memory, recall

HEADS, D = 2, 4
BOUNDS = {
    "dense": Bounds(2, 8),
    "uneven": Bounds(2, 11),
    "packed": Bounds(2, 10, ((0, 3), (3, 7), (10, 1), (11, 9))),
    "padded": Bounds.padded((5, 9, 2), 9),
    "idle": Bounds(2, 6, ((0, 5), (6, 0), (6, 6))),
}
TOKENS = ("q", "k", "v", "forget", "persist", "rate")


def arguments(bounds: Bounds, depth: int, normed: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    torch.manual_seed(depth)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * std).to(dtype)

    def between(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(bounds.rows, bounds.width, HEADS, dtype=torch.float64)).to(dtype)

    widths = [D, *[2 * D] * (depth - 1), D]
    return {
        **{name: draw(bounds.rows, bounds.width, HEADS, D, std=0.7) for name in "qkv"},
        "weights": tuple(draw(HEADS, i, o, std=0.4) for i, o in pairwise(widths)),
        "forget": between(0, 0.3), "persist": between(0, 0.9), "rate": between(0, 0.2),
        "norm": Norm(1 + draw(HEADS, D, std=0.2), draw(HEADS, D, std=0.2), 1e-6) if normed else None,
        "bounds": bounds,
    }  # fmt: skip


def close(a: Memory, b: Memory) -> None:
    for part, other in zip(a, b, strict=True):
        for x, y in zip(part, other, strict=True):
            torch.testing.assert_close(x, y)


def test_a_matrix_memory_written_out() -> None:
    """Depth 1 without norm: the surprise of eq. 17 by hand, no other code."""
    given = arguments(Bounds(1, 6), 1, normed=False)
    q, k, v, forget, persist, rate = (given[name][0, :, 0] for name in TOKENS)
    m = given["weights"][0][0]
    s, outs = torch.zeros_like(m), []
    for t in range(6):
        s = persist[t] * s - rate[t] * 2 * torch.outer(k[t], k[t] @ m - v[t])
        m = (1 - forget[t]) * m + s
        outs.append(q[t] @ m)
    for backend in ("reference", "chunked"):
        y, state = neural_memory(**given, chunk=1, backend=backend)
        torch.testing.assert_close(y[0, :, 0], torch.stack(outs))
        torch.testing.assert_close(state.now[0][0, 0], m)
        torch.testing.assert_close(state.momentum[0][0, 0], s)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("name", BOUNDS)
def test_chunks_equal_the_recurrence(name: str, chunk: int, depth: int, normed: bool) -> None:
    given = arguments(BOUNDS[name], depth, normed)
    want, state = neural_memory(**given, chunk=chunk, backend="reference")
    got, other = neural_memory(**given, chunk=chunk)
    torch.testing.assert_close(got, want)
    close(other, state)


def test_gates_at_their_ends() -> None:
    """No forgetting, all forgetting, no momentum: exact, and so are the gradients."""
    given = arguments(Bounds(1, 9), 2)
    given["forget"] = given["forget"].round(decimals=0)
    given["forget"][0, 4] = 1.0
    given["persist"][0, 3] = 0.0
    results = []
    leaves = [given[name].requires_grad_() for name in TOKENS]
    for backend in ("reference", "chunked"):
        y, _ = neural_memory(**given, chunk=4, backend=backend)
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_they_have_the_same_gradients(depth: int) -> None:
    bounds = BOUNDS["packed"]
    given = arguments(bounds, depth)
    leaves = [x.requires_grad_() for x in (*(given[n] for n in TOKENS), *given["weights"], *given["norm"][:2])]
    back = torch.randn(bounds.rows, bounds.width, HEADS, D, dtype=torch.float64)
    results = []
    for backend in ("reference", "chunked"):
        y, state = neural_memory(**given, chunk=4, backend=backend)
        total = (y * back).sum() + sum(w.sin().sum() for part in state for w in part)
        results.append(torch.autograd.grad(total, leaves))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_are_numerically_right(depth: int) -> None:
    given = arguments(Bounds(1, 5), depth)

    def run(*tensors: Tensor) -> Tensor:
        norm = Norm(tensors[-2], tensors[-1], 1e-6)
        filled = dict(zip(TOKENS, tensors, strict=False)) | {"weights": tensors[6 : 6 + depth], "norm": norm}
        return neural_memory(**{**given, **filled}, chunk=3)[0]

    inputs = [given[name] for name in TOKENS] + [*given["weights"], *given["norm"][:2]]
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("cuts", [(3, 4, 5, 10), tuple(range(1, 11)), (4, 8)])
def test_calls_may_be_cut_anywhere(depth: int, cuts: tuple[int, ...]) -> None:
    given = arguments(BOUNDS["uneven"], depth)
    want, final = neural_memory(**given, chunk=4)
    state, outs, seen = None, [], 0
    for end in (*cuts, 11):
        part = {**given, **{name: given[name][:, seen:end] for name in TOKENS}, "bounds": Bounds(2, end - seen)}
        y, state = neural_memory(**part, chunk=4, initial=state, before=() if state is None else (seen, seen))
        outs.append(y)
        seen = end
    torch.testing.assert_close(torch.cat(outs, 1), want)
    close(state, final)


def test_slots_may_stand_at_different_places() -> None:
    full = arguments(Bounds(2, 11), 2)
    want, _ = neural_memory(**full, chunk=4)

    def ragged(a: slice, b: slice) -> dict[str, Any]:
        lengths = (a.stop - a.start, b.stop - b.start)
        tokens = {name: torch.cat([full[name][0, a], full[name][1, b]])[None] for name in TOKENS}
        return {**full, **tokens, "bounds": Bounds.of_lengths(lengths)}

    y, state = neural_memory(**ragged(slice(0, 7), slice(0, 2)), chunk=4)
    torch.testing.assert_close(y[0], torch.cat([want[0, :7], want[1, :2]]))
    for extra in range(2):
        at = (7 + extra, 2 + extra)
        one = {name: torch.stack([full[name][i, t] for i, t in enumerate(at)])[:, None] for name in TOKENS}
        call = {**full, **one, "bounds": Bounds(2, 1), "chunk": 4, "initial": state, "before": at}
        _, other = neural_memory(**call, backend="reference")
        y, state = neural_memory(**call)
        close(state, other)
        torch.testing.assert_close(y[:, 0], torch.stack([want[i, t] for i, t in enumerate(at)]))
    y, _ = neural_memory(**ragged(slice(9, 11), slice(4, 11)), chunk=4, initial=state, before=(9, 4))
    torch.testing.assert_close(y[0], torch.cat([want[0, 9:], want[1, 4:]]))


def test_recall_answers_from_what_is_known() -> None:
    """With a rate of zero and nothing forgotten, reading changes nothing."""
    given = arguments(Bounds(1, 5), 2)
    given["forget"], given["rate"] = torch.zeros_like(given["forget"]), torch.zeros_like(given["rate"])
    y, state = neural_memory(**given, chunk=2)
    net = Net("gelu", False, given["norm"])
    by_head = recall(net, given["weights"], given["q"][0].transpose(0, 1))
    torch.testing.assert_close(y[0], by_head.transpose(0, 1))
    close(state, Memory(*(tuple(w[None] for w in given["weights"]),) * 2, state.momentum))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    given = arguments(BOUNDS["packed"], 2, dtype=dtype)
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}
    exact["weights"] = tuple(w.double() for w in given["weights"])
    exact["norm"] = Norm(given["norm"].weight.double(), given["norm"].bias.double(), 1e-6)
    y, state = neural_memory(**given, chunk=4)
    want, _ = neural_memory(**exact, chunk=4, backend="reference")
    assert y.dtype == dtype and state.now[0].dtype == torch.float32
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)


def test_what_it_refuses() -> None:
    given = arguments(Bounds(1, 3), 1)
    with pytest.raises(ValueError, match="'step' cannot run"):
        neural_memory(**given, chunk=2, backend="step")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        neural_memory(**given, chunk=2, backend="fast")
    with pytest.raises(ValueError, match="chunk is 0"):
        neural_memory(**given, chunk=0)
    with pytest.raises(ValueError, match="takes 7 inputs"):
        neural_memory(**{**given, "weights": (torch.zeros(HEADS, 7, D),)}, chunk=2)
    with pytest.raises(ValueError, match="0 lengths for 1 sequences"):
        neural_memory(**given, chunk=2, initial=Memory.start(given["weights"], 1))

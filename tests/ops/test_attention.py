"""Every backend x dtype x awkward shape, forward and backward, against the equations in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from landmark.ctx import Bounds
from landmark.ops.attention import attention, cpu, reference, visible

SHAPES = {  # name: (bounds of q, bounds of k)
    "dense": (Bounds(2, 63), Bounds(2, 63)),
    "one query": (Bounds(3, 1), Bounds(3, 41)),
    "chunk": (Bounds(2, 7), Bounds(2, 40)),
    "ragged": (Bounds.of_lengths((1, 30, 17)), Bounds.of_lengths((1, 30, 17))),
    "packed rows": (Bounds(2, 20, ((0, 3), (3, 17), (20, 20))), Bounds(2, 20, ((0, 3), (3, 17), (20, 20)))),
    "padded rows": (Bounds.padded((5, 12), 12), Bounds.padded((5, 12), 12)),
    "decode": (Bounds(3, 1), Bounds.padded((4, 33, 1), 33)),
    "padded on both sides": (Bounds.padded((5, 3), 6), Bounds.padded((7, 8), 9)),
    "padded queries": (Bounds.padded((5, 3), 6), Bounds(2, 8)),
    "rows that are not sequences": (Bounds(2, 6, ((0, 3), (3, 3))), Bounds(2, 9, ((0, 4), (9, 5)))),
    "ragged chunk": (Bounds.of_lengths((4, 9)), Bounds.padded((20, 9), 24)),
}


LONG = {  # several tiles of every backend, and heads of any size
    "tiles": (Bounds(1, 191), Bounds(1, 191), 6, 2, 80, 33),
    "chunk of tiles": (Bounds(2, 70), Bounds(2, 201), 4, 4, 64, 64),
    "documents": (Bounds.of_lengths((65, 1, 128, 63)), Bounds.of_lengths((65, 1, 128, 63)), 2, 1, 16, 128),
    "cross": (Bounds.padded((90, 2), 95), Bounds.padded((3, 140), 150), 3, 3, 7, 5),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
needs_kernel = pytest.mark.skipif(cpu.SOURCE.why_not() is not None, reason="no C compiler")
BACKENDS = [pytest.param("cpu", marks=needs_kernel), "torch"]


def inputs(
    bounds: Bounds, k_bounds: Bounds, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, d: int = 16, dv: int = 24
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(bounds.rows, bounds.width, heads, d, generator=g)
    k = torch.randn(k_bounds.rows, k_bounds.width, kv_heads, d, generator=g)
    v = torch.randn(k_bounds.rows, k_bounds.width, kv_heads, dv, generator=g)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def check(bounds: Bounds, k_bounds: Bounds, tensors: tuple[Tensor, ...], backend: str, options: dict[str, Any]) -> None:
    """Output and gradients within rounding of float64's."""
    tensors = tuple(t.requires_grad_() for t in tensors)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    if backend == "torch":
        backend = "sdpa" if options["softcap"] is None else "plain"
    y = attention(*tensors, bounds=bounds, k_bounds=k_bounds, backend=backend, **options)
    want = reference(*exact, bounds=bounds, k_bounds=k_bounds, **options)
    tolerance = TOLERANCE[y.dtype]
    assert y.dtype == tensors[0].dtype and y.shape == want.shape
    assert (y - want).abs().max() <= tolerance * want.abs().max()
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(weight.to(y.dtype))
    want.backward(weight)
    largest = max(t.grad.abs().max() for t in exact)  # those of q and k are 0 where a query sees one key
    for ours, theirs in zip(tensors, exact, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert (ours.grad - theirs.grad).abs().max() <= 2 * tolerance * largest


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends(shape: str, dtype: torch.dtype, backend: str) -> None:
    if backend == "cpu" and dtype == torch.float64:
        with pytest.raises(ValueError, match="float32 and bfloat16"):
            check(*SHAPES[shape], inputs(*SHAPES[shape], dtype), backend, OPTIONS)
        return
    for causal, window, softcap in itertools.product((True, False), (None, 1, 6), (None, 3.0)):
        options = {"scale": 0.3, "causal": causal, "window": window, "softcap": softcap}
        check(*SHAPES[shape], inputs(*SHAPES[shape], dtype), backend, options)


@needs_kernel
@pytest.mark.parametrize("shape", LONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tiles(shape: str, dtype: torch.dtype) -> None:
    bounds, k_bounds, *sizes = LONG[shape]
    masks = [(False, None, 3.0), (False, 190, None)]
    if shape != "cross":  # whose first queries a causal mask leaves no key
        masks += [(True, None, None), (True, 70, None), (True, 30, 5.0)]
    for causal, window, softcap in masks:
        options = {"scale": sizes[2] ** -0.5, "causal": causal, "window": window, "softcap": softcap}
        check(bounds, k_bounds, inputs(bounds, k_bounds, dtype, *sizes), "cpu", options)


OPTIONS: dict[str, Any] = {"scale": 0.3, "causal": True, "window": None, "softcap": None}


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_writes_all_and_reads_its_sequences_only(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """New buffers are NaN, and so is all that lies outside of the sequences or between the strides."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    bounds, k_bounds = Bounds.padded((5, 67), 80), Bounds(2, 90, ((3, 65), (90, 90)))
    parts = []
    for t, b in zip(inputs(bounds, k_bounds, dtype, d=48, dv=20), (bounds, k_bounds, k_bounds), strict=True):
        wide = torch.full((t.shape[0] + 1, t.shape[2], t.shape[1] + 3, t.shape[3] + 7), math.nan, dtype=dtype)
        view = wide[1:, :, 1:-2, 3:-4].transpose(1, 2)  # as a cache's [slots, heads, capacity, d]
        view[b.index() >= 0] = t[b.index() >= 0]
        parts.append(view)
    check(bounds, k_bounds, tuple(t.detach() for t in parts), "cpu", OPTIONS)
    y = attention(*parts, bounds=bounds, k_bounds=k_bounds, backend="cpu", **OPTIONS)
    assert bool((y[bounds.index() < 0] == 0).all())


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_neighbours_change_nothing(dtype: torch.dtype) -> None:
    """A sequence's output and gradients are the same to the bit alone, in a batch, and on any number of threads."""
    lengths = (130, 300, 63)
    bounds = Bounds.of_lengths(lengths)

    def run(tensors: list[Tensor], weight: Tensor, bounds: Bounds) -> list[Tensor]:
        tensors = [t.detach().clone().requires_grad_() for t in tensors]
        y = attention(*tensors, bounds=bounds, backend="cpu", **OPTIONS)
        y.backward(weight)
        return [y.detach(), *(t.grad for t in tensors)]

    tensors = list(inputs(bounds, bounds, dtype, heads=6, kv_heads=2, d=64, dv=64))
    weight = torch.randn(tensors[0].shape).to(dtype)
    together, before = run(tensors, weight, bounds), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, run(tensors, weight, bounds), together))
    finally:
        torch.set_num_threads(before)
    for start, n in bounds.sequences:
        alone = run([t[:, start : start + n] for t in tensors], weight[:, start : start + n], Bounds(1, n))
        assert all(torch.equal(a, b[:, start : start + n]) for a, b in zip(alone, together, strict=True))


@needs_kernel
def test_gradients_of_gradients() -> None:
    bounds = Bounds.of_lengths((3, 5))
    tensors = [t.requires_grad_() for t in inputs(bounds, bounds, torch.float32)]
    exact = [t.detach().double().requires_grad_() for t in tensors]

    def penalty(call: Any, tensors: list[Tensor]) -> list[Tensor]:
        y = call(*tensors, bounds=bounds, k_bounds=bounds, **OPTIONS)
        grads = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), tensors))

    for ours, theirs in zip(penalty(attention, tensors), penalty(reference, exact), strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@needs_kernel
def test_a_compiler_sees_one_op() -> None:
    bounds = Bounds(2, 20)
    q, k, v = (t.requires_grad_() for t in inputs(bounds, bounds, torch.float32))
    assert bounds.sequences  # cached: the lock of Python 3.11's cached_property is opaque to it

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, bounds=bounds, **OPTIONS)

    y, want = torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v), call(q, k, v)
    assert torch.equal(y, want)
    y.sum().backward()
    ours, q.grad = q.grad, None
    want.sum().backward()
    assert torch.equal(ours, q.grad)


def test_bias_needs_no_other_path() -> None:
    bounds = Bounds(2, 9, ((0, 4), (4, 5), (9, 7)))
    q, k, v = inputs(bounds, bounds, torch.float64)
    bias = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    options = {"scale": 0.3, "causal": False, "bias": bias, "bounds": bounds, "k_bounds": bounds}
    assert (attention(q, k, v, **options) - reference(q, k, v, **options)).abs().max() < 1e-12


@pytest.mark.parametrize("shape", ["packed rows", "padded rows", "ragged", "decode"])
def test_nothing_outside_a_sequence_is_read(shape: str) -> None:
    """Keys and values that belong to no sequence may be anything finite; those of another sequence, even NaN."""
    bounds, k_bounds = SHAPES[shape]
    q, k, v = inputs(bounds, k_bounds, torch.float32)
    clean = attention(q, k, v, bounds=bounds, k_bounds=k_bounds, scale=0.3, causal=True)
    owner = k_bounds.index()
    k2, v2 = k.clone(), v.clone()
    k2[owner != 0], v2[owner != 0] = 1e4, -1e4
    dirty = attention(q, k2, v2, bounds=bounds, k_bounds=k_bounds, scale=0.3, causal=True)
    assert torch.equal(clean[bounds.index() == 0], dirty[bounds.index() == 0])


@pytest.mark.parametrize(
    ("backend", "change", "reason"),
    [
        ("sdpa", {"softcap": 2.0}, "soft cap"),
        ("flash9", {}, "no such backend"),
        ("reference", {"dropout": 0.1}, "no dropout"),
        ("cpu", {"dropout": 0.1}, "no dropout"),
        ("cpu", {"bias": torch.zeros(1, 4, 3, 3)}, "no bias"),
        ("cpu", {"q": torch.zeros(1, 3, 4, 16, dtype=torch.float16)}, "float32 and bfloat16"),
        ("cpu", {"k": torch.zeros(1, 3, 2, 16, dtype=torch.bfloat16)}, "float32 and bfloat16"),
        ("cpu", {"q": torch.zeros(1, 3, 4, 16, device="meta")}, "on cpu"),
    ],
)
def test_forcing_a_backend_that_cannot(backend: str, change: dict[str, Any], reason: str) -> None:
    bounds = Bounds(1, 3)
    call = dict(zip("qkv", inputs(bounds, bounds, torch.float32), strict=True)) | change
    with pytest.raises(ValueError, match=f"{backend!r} cannot serve this call: .*{reason}"):
        attention(**call, bounds=bounds, scale=1.0, causal=True, backend=backend)


def test_visible() -> None:
    seen = visible(Bounds(1, 2), Bounds(1, 4), causal=True, window=2, device=torch.device("cpu"))
    assert seen[0, 0].tolist() == [[False, True, True, False], [False, False, True, True]]


def test_bounds() -> None:
    segments = torch.tensor([[1, 1, 2, 0, 0], [3, 3, 3, 3, 3]])
    bounds = Bounds.of_segments(segments)
    assert bounds.sequences == ((0, 2), (2, 1), (3, 2), (5, 5))
    assert bounds.offsets().tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]
    assert bounds.index().tolist() == [[0, 0, 1, 2, 2], [3] * 5]
    assert Bounds.of_segments(torch.ones(2, 3, dtype=torch.long)).dense
    assert Bounds.padded((2, 3), 3).index().tolist() == [[0, 0, -1], [1, 1, 1]]

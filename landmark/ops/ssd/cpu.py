"""Chunks as a C kernel: a head at a time in cache, so that neither masks nor decays are written to memory."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ...ctx import Bounds
from ..inference import inference_op, learns
from ..native import Source
from ..operator import operator
from ..spans import covers, spans

SOURCE = Source(Path(__file__).with_name("chunks.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
PARTS = 8  # as chunks.c's
ONE_THREAD = 2**10  # elements of x that a second thread would not finish any sooner
_PLAIN = (Tensor, Parameter)
_P, _I = c_void_p, c_int64
_SIGNATURES = {"ssd": (*[_P] * 8, _I, *[_P] * 3, c_int), "ssd_backward": (*[_P] * 8, _I, _I, *[_P] * 9, c_int)}


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    return SOURCE.function(f"{name}_{SUFFIX[dtype]}", *_SIGNATURES[name])


def why_not(x: Tensor, B: Tensor, C: Tensor) -> str | None:
    """None if the kernel can run, else why not."""
    for t in (x, B, C):
        if type(t) not in _PLAIN or not t.is_cpu or t.dtype not in SUFFIX or t.dtype != x.dtype:
            return (
                f"it takes plain tensors of one dtype, float32 or bfloat16, on cpu, not {type(t).__name__} "
                f"{t.dtype} on {t.device}"
            )
    return "it takes no empty tensors" if not x.numel() or not B.numel() else SOURCE.why_not()


def _rows(x: Tensor) -> Tensor:
    """x [B, T, n, m] with rows of n m numbers and one stride between them."""
    apart = x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)
    return x.contiguous() if apart or x.stride(3) != 1 or x.stride(2) != x.shape[3] else x


def _prepare(x: Tensor, B: Tensor, C: Tensor, chunk: int) -> tuple[list[Tensor], Tensor]:
    """The tensors in rows, and the sizes as the kernel takes them."""
    rows = [_rows(t) for t in (x, B, C)]
    return rows, torch.tensor([*(t.stride(1) for t in rows), *x.shape[2:], *B.shape[2:], chunk])


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > ONE_THREAD else 1


def _run(
    x: Tensor, B: Tensor, C: Tensor, dt: Tensor, A: Tensor, D: Tensor, initial: Tensor | None, spans: Tensor,
    whole: bool, chunk: int, chunks: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dt [B, T, H], A and D [H], initial [sequences, G, N, H / G * P] contiguous float32 -> y, final, and the states
    before each of `chunks` chunks, for backward (0: none)."""
    rows, sizes = _prepare(x, B, C, chunk)
    (heads, width), (groups, states) = x.shape[2:], B.shape[2:]
    state = torch.zeros(len(spans), groups, states, heads // groups * width) if initial is None else initial.clone()
    kept = torch.empty(chunks, heads, states, width)
    y = (torch.empty if whole else torch.zeros)(x.shape, dtype=x.dtype)
    _kernel("ssd", x.dtype)(
        *(t.data_ptr() for t in (*rows, dt, A, D, sizes, spans)), len(spans), state.data_ptr(),
        kept.data_ptr() if chunks else None, y.data_ptr(), _threads(x),
    )  # fmt: skip
    return y, state, kept


def _fake(
    x: Tensor, B: Tensor, C: Tensor, dt: Tensor, A: Tensor, D: Tensor, initial: Tensor | None, spans: Tensor,
    whole: bool, chunk: int, chunks: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (heads, width), (groups, states) = x.shape[2:], B.shape[2:]
    state = A.new_empty(spans.shape[0], groups, states, heads // groups * width)
    return x.new_empty(x.shape), state, A.new_empty(chunks, heads, states, width)


_ssd = operator("ssd")(_run)
_ssd.register_fake(_fake)
_ssd_inference = inference_op("ssd_inference", _run, _fake)


@operator("ssd_backward")
def _ssd_backward(
    x: Tensor, B: Tensor, C: Tensor, dt: Tensor, A: Tensor, D: Tensor, spans: Tensor, whole: bool, chunk: int,
    kept: Tensor, dy: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, B, C, dt, A, D and initial."""
    rows, sizes = _prepare(x, B, C, chunk)
    (heads, width), (groups, states) = x.shape[2:], B.shape[2:]
    new, parts = torch.empty if whole else torch.zeros, min(heads // groups, max(1, PARTS // groups))
    dx, ddt = new(x.shape, dtype=x.dtype), new(dt.shape)
    dB, dC = (new(parts, *B.shape) for _ in range(2))
    dA, dD = torch.zeros_like(A), torch.zeros_like(D)
    if dfinal is None:
        g = torch.zeros(len(spans), groups, states, heads // groups * width)
    else:
        g = dfinal.clone(memory_format=torch.contiguous_format)
    dy = dy.contiguous()
    _kernel("ssd_backward", x.dtype)(
        *(t.data_ptr() for t in (*rows, dt, A, D, sizes, spans)), len(spans), x.shape[0] * x.shape[1],
        *(t.data_ptr() for t in (kept, dy, dx, ddt, dA, dD, dB, dC, g)), _threads(x),
    )  # fmt: skip
    return dx, dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), ddt, dA, dD, g


@_ssd_backward.register_fake
def _(
    x: Tensor, B: Tensor, C: Tensor, dt: Tensor, A: Tensor, D: Tensor, spans: Tensor, whole: bool, chunk: int,
    kept: Tensor, dy: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (heads, width), (groups, states) = x.shape[2:], B.shape[2:]
    state = A.new_empty(spans.shape[0], groups, states, heads // groups * width)
    dx, dB, dC, ddt, dA, dD = (t.new_empty(t.shape) for t in (x, B, C, dt, A, D))
    return dx, dB, dC, ddt, dA, dD, state


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial, spans, ctx.whole, ctx.chunk, _ = inputs
    ctx.has_initial = initial is not None
    ctx.save_for_backward(*tensors, spans, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, spans, kept = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    *grads, g = _ssd_backward(*tensors, spans, ctx.whole, ctx.chunk, kept, dy, dfinal)
    return *grads, g if ctx.has_initial else None, None, None, None, None


_ssd.register_autograd(_backward, setup_context=_setup)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bounds: Bounds, initial: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `reference.ssd`; all sums in float32."""
    size = min(chunk, max(bounds.longest, 1))
    few = [None if t is None else t.float().contiguous() for t in (dt, A, D, initial)]
    keep = learns(x, B, C, *few)
    y, final, _ = (_ssd if keep else _ssd_inference)(
        x, B, C, *few, spans(bounds), covers(bounds), size,
        bounds.memo(("ssd", size), lambda: sum(-(-n // size) for _, n in bounds.sequences)) if keep else 0,
    )  # fmt: skip
    return y, final

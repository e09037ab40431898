"""The selective scan as a C kernel: the states of a text never exist, but for one in 32 tokens while training."""

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

SOURCE = Source(Path(__file__).with_name("scan.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
STEPS, PARTS, LANES = 32, 16, 8  # as scan.c's; lanes are at least so many
MAX_STATES = 256
ONE_THREAD = 2**10  # channels x tokens that a second thread would not finish any sooner
_PLAIN = (Tensor, Parameter)
_P, _I = c_void_p, c_int64
_SIGNATURES = {
    "scan": (*[_P] * 9, *[_I] * 3, *[_P] * 3, c_int),
    "scan_backward": (*[_P] * 9, *[_I] * 4, *[_P] * 9, c_int),
}


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    return SOURCE.function(f"{name}_{SUFFIX[dtype]}", *_SIGNATURES[name])


def why_not(x: Tensor, *others: Tensor | None, states: int) -> str | None:
    """None if the kernel can run on x and what else has a row for every token, else why not."""
    for t in (x, *others):
        if t is not None and (type(t) not in _PLAIN or not t.is_cpu or t.dtype not in SUFFIX or t.dtype != x.dtype):
            return (
                f"it takes plain tensors of one dtype, float32 or bfloat16, on cpu, not {type(t).__name__} "
                f"{t.dtype} on {t.device}"
            )
    if not x.numel() or not 0 < states <= MAX_STATES:
        return f"it takes 1 to {MAX_STATES} states and no empty tensors, not {states} states and {list(x.shape)}"
    return SOURCE.why_not()


def _rows(x: Tensor) -> Tensor:
    """x [B, T, n] with unit stride within rows and one stride between them."""
    if x.stride(2) != 1 or (x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
        return x.contiguous()
    return x


def _prepare(tensors: tuple[Tensor | None, ...]) -> tuple[list[Tensor | None], Tensor, list[int | None]]:
    """The tensors in rows, their strides, and their pointers."""
    rows = [None if t is None else _rows(t) for t in tensors]
    strides = torch.tensor([0 if t is None else t.stride(1) for t in rows])
    return rows, strides, [None if t is None else t.data_ptr() for t in rows]


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > ONE_THREAD else 1


def _run(
    x: Tensor, delta: Tensor, z: Tensor | None, B: Tensor, C: Tensor, A: Tensor, D: Tensor, initial: Tensor | None,
    spans: Tensor, whole: bool, chunks: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A [N, C], D [C], initial [sequences, N, C] float32 -> y, final, and the states before
    each of `chunks` pieces of the sequences, for backward (0: none)."""
    rows, strides, pointers = _prepare((x, delta, z, B, C))
    states, channels = A.shape
    h = initial.clone() if initial is not None else torch.zeros(len(spans), states, channels)
    kept = torch.empty(chunks, states, channels)
    y = (torch.empty if whole else torch.zeros)(x.shape, dtype=x.dtype)
    _kernel("scan", x.dtype)(
        *pointers, A.data_ptr(), D.data_ptr(), strides.data_ptr(), spans.data_ptr(), len(spans), channels, states,
        h.data_ptr(), kept.data_ptr() if chunks else None, y.data_ptr(), _threads(x),
    )  # fmt: skip
    del rows
    return y, h, kept


def _fake(
    x: Tensor, delta: Tensor, z: Tensor | None, B: Tensor, C: Tensor, A: Tensor, D: Tensor, initial: Tensor | None,
    spans: Tensor, whole: bool, chunks: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), A.new_empty(spans.shape[0], *A.shape), A.new_empty(chunks, *A.shape)


_scan = operator("selective_scan")(_run)
_scan.register_fake(_fake)
_scan_inference = inference_op("selective_scan_inference", _run, _fake)


@operator("selective_scan_backward")
def _scan_backward(
    x: Tensor, delta: Tensor, z: Tensor | None, B: Tensor, C: Tensor, A: Tensor, D: Tensor, spans: Tensor, whole: bool,
    kept: Tensor, dy: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, delta, z (empty if there is none), B and C side by side (float32), A, D and initial."""
    rows, strides, pointers = _prepare((x, delta, z, B, C))
    (states, channels), tokens, new = A.shape, x.shape[0] * x.shape[1], torch.empty if whole else torch.zeros
    dx, ddelta = (new(x.shape, dtype=x.dtype) for _ in range(2))
    dz = torch.empty(0, dtype=x.dtype) if z is None else new(x.shape, dtype=x.dtype)
    dA, dD = torch.zeros(states, channels), torch.zeros(channels)
    g = torch.zeros(len(spans), states, channels) if dfinal is None else dfinal.clone().contiguous()
    dBC = new((PARTS, tokens, 2 * states), dtype=torch.float32)
    if channels <= (PARTS - 1) * 2 * LANES:
        dBC.zero_()  # fewer blocks of channels than parts leave some unwritten
    dy = dy.contiguous()
    _kernel("scan_backward", x.dtype)(
        *pointers, A.data_ptr(), D.data_ptr(), strides.data_ptr(), spans.data_ptr(), len(spans), channels, states,
        tokens, kept.data_ptr(), dy.data_ptr(), dx.data_ptr(), ddelta.data_ptr(), None if z is None else dz.data_ptr(),
        dA.data_ptr(), dD.data_ptr(), g.data_ptr(), dBC.data_ptr(), _threads(x),
    )  # fmt: skip
    del rows
    return dx, ddelta, dz, dBC.sum(0), dA, dD, g


@_scan_backward.register_fake
def _(
    x: Tensor, delta: Tensor, z: Tensor | None, B: Tensor, C: Tensor, A: Tensor, D: Tensor, spans: Tensor, whole: bool,
    kept: Tensor, dy: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, ddelta = x.new_empty(x.shape), x.new_empty(x.shape)
    dz = x.new_empty(0 if z is None else x.shape)
    dBC = A.new_empty(x.shape[0] * x.shape[1], 2 * A.shape[0])
    return dx, ddelta, dz, dBC, torch.empty_like(A), torch.empty_like(D), A.new_empty(spans.shape[0], *A.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial, spans, ctx.whole, _ = inputs
    ctx.has_initial = initial is not None
    ctx.save_for_backward(*tensors, spans, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, delta, z, B, C, A, D, spans, kept = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, ddelta, dz, dBC, dA, dD, g = _scan_backward(x, delta, z, B, C, A, D, spans, ctx.whole, kept, dy, dfinal)
    dB, dC = dBC.to(B.dtype).view(*B.shape[:2], -1).chunk(2, -1)
    return (
        dx, ddelta, None if z is None else dz, dB, dC, dA, dD, g if ctx.has_initial else None, None, None, None,
    )  # fmt: skip


_scan.register_autograd(_backward, setup_context=_setup)


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, bounds: Bounds,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `reference.selective_scan`; states are float32."""
    initial = None if initial is None else initial.float().contiguous()
    keep = learns(x, delta, A, B, C, D, z, initial)
    y, final, _ = (_scan if keep else _scan_inference)(
        x, delta, z, B, C, A.float().mT.contiguous(), D.float().contiguous(), initial, spans(bounds), covers(bounds),
        bounds.memo("scan", lambda: sum(-(-n // STEPS) for _, n in bounds.sequences)) if keep else 0,
    )  # fmt: skip
    return y, final

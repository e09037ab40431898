"""The delta rule as a C kernel, token by token: states stay in the nearest cache, one in 16 is kept for backward."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ...ctx import Bounds
from ..native import Source
from ..operator import operator
from ..spans import covers, spans

SOURCE = Source(Path(__file__).with_name("delta.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
STEPS = 16  # as delta.c's
LANES, WIDEST = 16, 256
ONE_THREAD = 2**10  # width x tokens that a second thread would not finish any sooner
_PLAIN = (Tensor, Parameter)
_P, _I = c_void_p, c_int64
_SIGNATURES = {
    "delta": (*[_P] * 4, *[_I] * 3, *[_P] * 4, c_int),
    "delta_backward": (*[_P] * 4, *[_I] * 3, *[_P] * 4, c_int),
}


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    return SOURCE.function(f"{name}_{SUFFIX[dtype]}", *_SIGNATURES[name])


def why_not(r: Tensor, *others: Tensor | None) -> str | None:
    """None if the kernel can run on r and what else has a row for every token, else why not."""
    for t in (r, *others):
        if t is not None and (type(t) not in _PLAIN or not t.is_cpu or t.dtype not in SUFFIX or t.dtype != r.dtype):
            return (
                f"it takes plain tensors of one dtype, float32 or bfloat16, on cpu, not {type(t).__name__} "
                f"{t.dtype} on {t.device}"
            )
    if not r.numel() or r.shape[3] % LANES or r.shape[3] > WIDEST:
        return (
            f"it takes heads as wide as a multiple of {LANES}, to {WIDEST}, and no empty tensors, not {list(r.shape)}"
        )
    return SOURCE.why_not()


def _rows(x: Tensor) -> Tensor:
    """x [B, T, H, N] with unit stride within rows and one stride between them."""
    if x.stride(3) != 1 or x.stride(2) != x.shape[3] or (x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
        return x.contiguous()
    return x


def _call(
    name: str, rows: Sequence[Tensor | None], log_decay: Tensor, spans: Tensor, *more: object, width: int, heads: int
) -> None:
    r = rows[0]
    assert r is not None
    table = (c_void_p * 6)(*(None if t is None else t.data_ptr() for t in rows))
    strides = (c_int64 * 7)(*(0 if t is None else t.stride(1) for t in rows), log_decay.stride(1))
    threads = torch.get_num_threads() if r.numel() > ONE_THREAD else 1
    _kernel(name, r.dtype)(
        table, strides, log_decay.data_ptr(), spans.data_ptr(), len(spans), heads, width, *more, threads
    )


def _delta(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, initial: Tensor | None,
    spans: Tensor, whole: bool, kept: Tensor | None = None, found: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log_decay, initial float32 -> y and the states after; for backward, `kept` takes those before every STEPS tokens,
    and `found` [B, T, H, N] what each a found in memory."""
    rows = [None if t is None else _rows(t) for t in (r, k, v, a, b, None)]
    heads, width = r.shape[2:]
    S = torch.zeros(len(spans), heads, width, width) if initial is None else initial.clone()
    y = (torch.empty if whole else torch.zeros)(r.shape, dtype=r.dtype)
    _call(
        "delta", rows, _rows(log_decay), spans, S.data_ptr(), None if kept is None else kept.data_ptr(),
        None if found is None else found.data_ptr(), y.data_ptr(), width=width, heads=heads,
    )  # fmt: skip
    return y, S


@operator("delta_rule")
def _op(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, initial: Tensor | None,
    spans: Tensor, whole: bool, pieces: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the states after, and what `_delta` keeps for backward of `pieces` pieces."""
    kept = torch.empty(pieces, r.shape[2], r.shape[3], r.shape[3])
    found = torch.empty(r.shape if pieces and a is not None else (0,))
    given = kept if pieces else None, found if len(found) else None
    return *_delta(r, log_decay, k, v, a, b, initial, spans, whole, *given), kept, found


@_op.register_fake
def _(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, initial: Tensor | None,
    spans: Tensor, whole: bool, pieces: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (heads, width), new = r.shape[2:], log_decay.new_empty
    found = new(r.shape if pieces and a is not None else (0,))
    return r.new_empty(r.shape), new(spans.shape[0], heads, width, width), new(pieces, heads, width, width), found


@operator("delta_rule_backward")
def _op_backward(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, spans: Tensor, whole: bool,
    kept: Tensor, found: Tensor, dy: Tensor, dfinal: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of r, k, v, log_decay, initial and, where there are a and b, of these."""
    rows = [None if t is None else _rows(t) for t in (r, k, v, a, b, dy)]
    (heads, width), new = r.shape[2:], torch.empty if whole else torch.zeros
    dr, dk, dv = (new(r.shape, dtype=r.dtype) for _ in range(3))
    da, db = (None if a is None else new(r.shape, dtype=r.dtype) for _ in range(2))
    dw = new(r.shape)
    S = (
        torch.zeros(len(spans), *kept.shape[1:])
        if dfinal is None
        else dfinal.clone(memory_format=torch.contiguous_format)
    )
    grads = (c_void_p * 6)(*(None if t is None else t.data_ptr() for t in (dr, dk, dv, da, db, dw)))
    _call(
        "delta_backward", rows, _rows(log_decay), spans, kept.data_ptr(), found.data_ptr() if a is not None else None,
        S.data_ptr(), grads, width=width, heads=heads,
    )  # fmt: skip
    return [dr, dk, dv, dw, S, *(t for t in (da, db) if t is not None)]


@_op_backward.register_fake
def _(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, spans: Tensor, whole: bool,
    kept: Tensor, found: Tensor, dy: Tensor, dfinal: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    like = [r.new_empty(r.shape) for _ in range(3 if a is None else 5)]
    S = kept.new_empty(spans.shape[0], *kept.shape[1:])
    return [*like[:3], kept.new_empty(r.shape), S, *like[3:]]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, initial, spans, ctx.whole, _ = inputs
    ctx.has_initial = initial is not None
    ctx.save_for_backward(*tensors, spans, output[2], output[3])
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    r, log_decay, k, v, a, b, spans, kept, found = ctx.saved_tensors
    dy = torch.zeros_like(r) if dy is None else dy
    dr, dk, dv, dw, dS, *dab = _op_backward(r, log_decay, k, v, a, b, spans, ctx.whole, kept, found, dy, dfinal)
    da, db = dab or (None, None)
    return dr, dw, dk, dv, da, db, dS if ctx.has_initial else None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


def delta_rule(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, bounds: Bounds,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `reference.delta_rule`; states are float32."""
    log_decay = log_decay.float()
    initial = None if initial is None else initial.float().contiguous()
    given = (r, log_decay, k, v, a, b, initial)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if not keep and not torch.compiler.is_compiling():
        return _delta(*given, spans(bounds), covers(bounds))
    pieces = bounds.memo(("delta", STEPS), lambda: sum(-(-n // STEPS) for _, n in bounds.sequences)) if keep else 0
    y, final, _, _ = _op(*given, spans(bounds), covers(bounds), pieces)
    return y, final

"""WKV as a C kernel: the sums never leave the registers, but for one token in 32 while training."""

from __future__ import annotations

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

SOURCE = Source(Path(__file__).with_name("wkv.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
STEPS = 32  # as wkv.c's
ONE_THREAD = 2**12  # channels x tokens that a second thread would not finish any sooner
_PLAIN = (Tensor, Parameter)
_P, _I = c_void_p, c_int64
_SIGNATURES = {
    "wkv": (_P, _P, _I, _I, *[_P] * 3, _I, _I, *[_P] * 3, c_int),
    "wkv_backward": (_P, _P, _I, _I, *[_P] * 3, _I, _I, *[_P] * 8, c_int),
}


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    return SOURCE.function(f"{name}_{SUFFIX[dtype]}", *_SIGNATURES[name])


def why_not(k: Tensor, v: Tensor) -> str | None:
    """None if the kernel can run, else why not."""
    for t in (k, v):
        if type(t) not in _PLAIN or not t.is_cpu or t.dtype not in SUFFIX or t.dtype != k.dtype:
            return (
                f"it takes plain tensors of one dtype, float32 or bfloat16, on cpu, not {type(t).__name__} "
                f"{t.dtype} on {t.device}"
            )
    if not k.numel():
        return "it takes no empty tensors"
    return SOURCE.why_not()


def _rows(x: Tensor) -> Tensor:
    """x [B, T, C] with unit stride within rows and one stride between them."""
    if x.stride(2) != 1 or (x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
        return x.contiguous()
    return x


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > ONE_THREAD else 1


def _wkv(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial: Tensor | None, spans: Tensor, whole: bool, pieces: int
) -> tuple[Tensor, Tensor, Tensor]:
    """w, u, initial float32 -> y, the states after, and those before each of `pieces` (0: none) for backward."""
    k, v, channels = _rows(k), _rows(v), k.shape[2]
    state = torch.zeros(len(spans), 3, channels) if initial is None else initial.clone()
    kept = torch.empty(pieces, 3, channels)
    y = (torch.empty if whole else torch.zeros)(k.shape, dtype=k.dtype)
    _kernel("wkv", k.dtype)(
        k.data_ptr(), v.data_ptr(), k.stride(1), v.stride(1), w.data_ptr(), u.data_ptr(), spans.data_ptr(), len(spans),
        channels, state.data_ptr(), kept.data_ptr() if pieces else None, y.data_ptr(), _threads(k),
    )  # fmt: skip
    return y, state, kept


@operator("wkv")
def _op(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial: Tensor | None, spans: Tensor, whole: bool, pieces: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _wkv(k, v, w, u, initial, spans, whole, pieces)


@_op.register_fake
def _(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial: Tensor | None, spans: Tensor, whole: bool, pieces: int
) -> tuple[Tensor, Tensor, Tensor]:
    return k.new_empty(k.shape), w.new_empty(spans.shape[0], 3, len(w)), w.new_empty(pieces, 3, len(w))


@operator("wkv_backward")
def _op_backward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, spans: Tensor, whole: bool, kept: Tensor, final: Tensor, dy: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of k, v, w, u and initial."""
    k, v, dy, new = _rows(k), _rows(v), dy.contiguous(), torch.empty if whole else torch.zeros
    dk, dv = new(k.shape, dtype=k.dtype), new(k.shape, dtype=k.dtype)
    dw, du = torch.empty_like(w), torch.empty_like(u)
    dstate = torch.zeros(final.shape) if dfinal is None else dfinal.clone(memory_format=torch.contiguous_format)
    _kernel("wkv_backward", k.dtype)(
        k.data_ptr(), v.data_ptr(), k.stride(1), v.stride(1), w.data_ptr(), u.data_ptr(), spans.data_ptr(), len(spans),
        k.shape[2], kept.data_ptr(), final.data_ptr(), dy.data_ptr(), dstate.data_ptr(), dk.data_ptr(), dv.data_ptr(),
        dw.data_ptr(), du.data_ptr(), _threads(k),
    )  # fmt: skip
    return dk, dv, dw, du, dstate


@_op_backward.register_fake
def _(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, spans: Tensor, whole: bool, kept: Tensor, final: Tensor, dy: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        k.new_empty(k.shape), k.new_empty(k.shape), torch.empty_like(w), torch.empty_like(u), torch.empty_like(final)
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial, spans, ctx.whole, _ = inputs
    ctx.has_initial = initial is not None
    ctx.save_for_backward(*tensors, spans, output[2], output[1])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    k, v, w, u, spans, kept, final = ctx.saved_tensors
    dy = torch.zeros_like(k) if dy is None else dy
    dk, dv, dw, du, dstate = _op_backward(k, v, w, u, spans, ctx.whole, kept, final, dy, dfinal)
    return dk, dv, dw, du, dstate if ctx.has_initial else None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


def wkv(
    k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, bounds: Bounds, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `reference.wkv`; states are float32."""
    w, u = log_decay.float().contiguous(), bonus.float().contiguous()
    initial = None if initial is None else initial.float().contiguous()
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (k, v, w, u, initial))
    pieces = bounds.memo(("wkv", STEPS), lambda: sum(-(-n // STEPS) for _, n in bounds.sequences)) if keep else 0
    run = _op if keep or torch.compiler.is_compiling() else _wkv
    y, final, _ = run(k, v, w, u, initial, spans(bounds), covers(bounds), pieces)
    return y, final

"""Causal depthwise convolution as a C kernel, forward and backward each one pass over memory."""

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

SOURCE = Source(Path(__file__).with_name("conv.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
MAX_TAPS = 16
ONE_THREAD = 2**13  # elements that a second thread would not finish any sooner
_PLAIN = (Tensor, Parameter)
_SIGNATURES = {
    "conv": (*[c_void_p] * 7, *[c_int64] * 4, c_int, c_int),
    "conv_backward": (*[c_void_p] * 10, *[c_int64] * 4, c_int, c_int),
}


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    return SOURCE.function(f"{name}_{SUFFIX[dtype]}", *_SIGNATURES[name])


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None) -> str | None:
    """None if the kernel can run, else why not."""
    for t in (x, weight, bias, initial):
        if t is not None and (type(t) not in _PLAIN or not t.is_cpu or t.dtype not in SUFFIX or t.dtype != x.dtype):
            return (
                f"it takes plain tensors of one dtype, float32 or bfloat16, on cpu, not {type(t).__name__} "
                f"{t.dtype} on {t.device}"
            )
    if not x.numel() or weight.shape[1] > MAX_TAPS:
        return f"it takes 1 to {MAX_TAPS} taps and no empty tensors, not {weight.shape[1]} taps and {list(x.shape)}"
    return SOURCE.why_not()


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x [B, T, C] with unit stride within rows and one stride between them, and that stride."""
    if x.stride(2) != 1 or (x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
        x = x.contiguous()
    return x, x.stride(1)


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > ONE_THREAD else 1


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, spans: Tensor, whole: bool, silu: bool
) -> tuple[Tensor, Tensor]:
    (channels, taps), (x, ld) = weight.shape, _rows(x)
    weight, bias, initial = weight.contiguous(), _contiguous(bias), _contiguous(initial)
    y = (torch.empty if whole else torch.zeros)(x.shape, dtype=x.dtype)
    last = torch.empty(len(spans), taps - 1, channels, dtype=x.dtype)
    _kernel("conv", x.dtype)(
        x.data_ptr(), weight.data_ptr(), _pointer(bias), _pointer(initial), spans.data_ptr(), y.data_ptr(),
        last.data_ptr(), len(spans), channels, taps, ld, silu, _threads(x),
    )  # fmt: skip
    return y, last


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, spans: Tensor, whole: bool, silu: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(spans.shape[0], weight.shape[1] - 1, weight.shape[0])


_conv = operator("causal_conv")(_run)
_conv.register_fake(_fake)
_conv_inference = inference_op("causal_conv_inference", _run, _fake)


@operator("causal_conv_backward")
def _conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, spans: Tensor, whole: bool, silu: bool,
    dy: Tensor, dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x and initial (empty if there is none), and [K + 1, C] float32 of all taps and the bias."""
    (channels, taps), (x, ld) = weight.shape, _rows(x)
    weight, bias, initial, dlast = weight.contiguous(), _contiguous(bias), _contiguous(initial), _contiguous(dlast)
    dy = dy.contiguous()
    dx = (torch.empty if whole else torch.zeros)(x.shape, dtype=x.dtype)
    dfirst = torch.empty(0, dtype=x.dtype) if initial is None else torch.empty_like(initial)
    dw = torch.zeros(taps + 1, channels)
    _kernel("conv_backward", x.dtype)(
        x.data_ptr(), weight.data_ptr(), _pointer(bias), _pointer(initial), spans.data_ptr(), dy.data_ptr(),
        _pointer(dlast), dx.data_ptr(), None if initial is None else dfirst.data_ptr(), dw.data_ptr(), len(spans),
        channels, taps, ld, silu, _threads(x),
    )  # fmt: skip
    return dx, dfirst, dw


@_conv_backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, spans: Tensor, whole: bool, silu: bool,
    dy: Tensor, dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    first = x.new_empty(0) if initial is None else torch.empty_like(initial)
    dw = x.new_empty(weight.shape[1] + 1, weight.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), first, dw


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.whole, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial, spans = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dfirst, dw = _conv_backward(x, weight, bias, initial, spans, ctx.whole, ctx.silu, dy, dlast)
    return (
        dx, dw[:-1].mT.to(weight.dtype), None if bias is None else dw[-1].to(bias.dtype),
        None if initial is None else dfirst, None, None, None,
    )  # fmt: skip


_conv.register_autograd(_backward, setup_context=_setup)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, bounds: Bounds, initial: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.causal_conv`; sums in float32."""
    op = _conv if learns(x, weight, bias, initial) else _conv_inference
    y, last = op(x, weight, bias, initial, spans(bounds), covers(bounds), silu)
    return y, last

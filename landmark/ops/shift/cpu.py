"""Token shift as a C kernel: the tokens are read once for all mixes, forward and backward."""

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

SOURCE = Source(Path(__file__).with_name("shift.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
ONE_THREAD = 2**14  # elements that a second thread would not finish any sooner
_PLAIN = (Tensor, Parameter)
_P, _I = c_void_p, c_int64
_SIGNATURES = {
    "mix": (_P, _I, *[_P] * 3, *[_I] * 3, *[_P] * 2, c_int),
    "mix_backward": (_P, _I, *[_P] * 3, *[_I] * 3, *[_P] * 5, c_int),
}


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    return SOURCE.function(f"{name}_{SUFFIX[dtype]}", *_SIGNATURES[name])


def why_not(x: Tensor, mix: Tensor, initial: Tensor | None) -> str | None:
    """None if the kernel can run, else why not."""
    for t in (x, mix, initial):
        if t is not None and (type(t) not in _PLAIN or not t.is_cpu or t.dtype not in SUFFIX):
            return (
                f"it takes plain tensors, float32 or bfloat16, on cpu, not {type(t).__name__} {t.dtype} on {t.device}"
            )
    if not x.numel():
        return "it takes no empty tensors"
    return SOURCE.why_not()


def _rows(x: Tensor) -> Tensor:
    """x [B, T, C] with unit stride within rows and one stride between them."""
    if x.stride(2) != 1 or (x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
        return x.contiguous()
    return x


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _pointers(tensors: list[Tensor | None]) -> Any:
    return (c_void_p * len(tensors))(*map(_pointer, tensors))


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > ONE_THREAD else 1


def _new(x: Tensor, whole: bool, *lead: int) -> Tensor:
    return (torch.empty if whole else torch.zeros)((*lead, *x.shape), dtype=x.dtype)


def _mix(x: Tensor, mix: Tensor, initial: Tensor | None, spans: Tensor, ys: list[Tensor]) -> Tensor:
    """mix float32, initial as x -> the mixed tokens, in `ys`, and the last ones."""
    x = _rows(x)
    last = torch.empty(len(spans), x.shape[2], dtype=x.dtype)
    _kernel("mix", x.dtype)(
        x.data_ptr(), x.stride(1), mix.data_ptr(), _pointer(initial), spans.data_ptr(), len(spans), len(ys),
        x.shape[2], _pointers([*ys]), last.data_ptr(), _threads(x),
    )  # fmt: skip
    return last


@operator("token_mix")
def _op(x: Tensor, mix: Tensor, initial: Tensor | None, spans: Tensor, whole: bool) -> tuple[list[Tensor], Tensor]:
    ys = [_new(x, whole) for _ in range(len(mix))]
    return ys, _mix(x, mix, initial, spans, ys)


@_op.register_fake
def _(x: Tensor, mix: Tensor, initial: Tensor | None, spans: Tensor, whole: bool) -> tuple[list[Tensor], Tensor]:
    return [x.new_empty(x.shape) for _ in range(mix.shape[0])], x.new_empty(spans.shape[0], x.shape[2])


@operator("token_mix_backward")
def _op_backward(
    x: Tensor, mix: Tensor, initial: Tensor | None, spans: Tensor, whole: bool, dys: list[Tensor], dlast: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, mix (float32) and initial (empty if there is none); an empty dy stands for none."""
    x, dx = _rows(x), (torch.empty if whole else torch.zeros)(x.shape, dtype=x.dtype)
    dmix = torch.zeros(mix.shape)
    dinitial = torch.empty(0, dtype=x.dtype) if initial is None else torch.empty_like(initial)
    given = [dy.contiguous() if dy.numel() else None for dy in dys]
    dlast = None if dlast is None else dlast.contiguous()
    _kernel("mix_backward", x.dtype)(
        x.data_ptr(), x.stride(1), mix.data_ptr(), _pointer(initial), spans.data_ptr(), len(spans), len(mix),
        x.shape[2], _pointers(given), _pointer(dlast), dx.data_ptr(), None if initial is None else dinitial.data_ptr(),
        dmix.data_ptr(), _threads(x),
    )  # fmt: skip
    return dx, dmix, dinitial


@_op_backward.register_fake
def _(
    x: Tensor, mix: Tensor, initial: Tensor | None, spans: Tensor, whole: bool, dys: list[Tensor], dlast: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(mix), x.new_empty(0) if initial is None else torch.empty_like(initial)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    *tensors, ctx.whole = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dys: list[Tensor | None], dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    x, mix, initial, spans = ctx.saved_tensors
    given = [x.new_empty(0) if dy is None else dy for dy in dys]
    dx, dmix, dinitial = _op_backward(x, mix, initial, spans, ctx.whole, given, dlast)
    return dx, dmix, None if initial is None else dinitial, None, None


_op.register_autograd(_backward, setup_context=_setup)


def token_mix(x: Tensor, mix: Tensor, bounds: Bounds, initial: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """As `reference.token_mix`; sums in float32."""
    initial = None if initial is None else initial.to(x.dtype).contiguous()
    mix = mix.float().contiguous()
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        mixed, last = _op(x, mix, initial, spans(bounds), covers(bounds))
        return mixed, last
    ys = list(_new(x, covers(bounds), len(mix)).unbind())
    return ys, _mix(x, mix, initial, spans(bounds), ys)

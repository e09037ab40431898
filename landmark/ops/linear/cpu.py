"""Linear maps on the processor: `skinny` for few rows at memory speed, `onednn` for float32 products, `widened` for
those of bfloat16 where the processor has none.

`skinny` reads the weight once, in order, on all threads, for up to 16 rows. `onednn` calls the product that torch keeps
for its compiler: the float32 product of F.linear is MKL's, which leaves AVX-512 unused where Intel did not make the
processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import products
from ..inference import inference_op
from ..native import TRANSFORMED, Source, processor, transformed
from ..operator import operator

SOURCE = Source(Path(__file__).with_name("skinny.c"))
KERNELS = {torch.float32: "linear_f32", torch.bfloat16: "linear_bf16"}
MAX_ROWS = 16  # beyond them the matrix product is as fast
ONE_THREAD = 2**17  # bytes of weight that a second thread would not read any sooner
MIN_PRODUCT = 2**21  # rows x in x out from which oneDNN's set-up pays
_pack = Struct("4P2q").pack  # maps.h's Map
MIN_WIDENED = 2**18  # the same from which widening does
ONEDNN = torch.backends.mkldnn.is_available() and "mkldnn::_linear_pointwise" in torch._C._dispatch_get_all_op_names()
ONEDNN_IS_FASTER = ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512" and "GenuineIntel" not in processor()


@cache
def _kernel(dtype: torch.dtype) -> Any:
    return SOURCE.function(KERNELS[dtype], c_void_p, c_char_p, *[c_int64] * 3, c_int)


@cache
def kind(dtype: torch.dtype) -> int | None:
    """The address of maps.h's Kind of plain weights; None where there is no kernel."""
    return SOURCE.address(f"kind_{KERNELS[dtype][7:]}") if dtype in KERNELS and SOURCE.why_not() is None else None


def why_not_skinny(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """None if `skinny` can run, else why not."""
    if (reason := _why_not_plain(x, weight, bias)) is not None:
        return reason
    if weight.dtype not in KERNELS:
        return f"it takes float32 and bfloat16, not {weight.dtype}"
    if not 0 < (rows := x.numel() // max(1, weight.shape[1])) <= MAX_ROWS:
        return f"it takes 1 to {MAX_ROWS} rows, not {rows}"
    if weight.stride(1) != 1:
        return "the weight's rows are not contiguous"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return "it has no gradient"
    return SOURCE.why_not()


def why_not_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """None if `onednn` can run, else why not."""
    if (reason := _why_not_plain(x, weight, bias)) is not None:
        return reason
    if weight.dtype != torch.float32:
        return f"it takes float32, not {weight.dtype}"
    if x.numel() == 0 or weight.numel() == 0:
        return "it takes no empty tensors"
    return None if ONEDNN else "this torch has no oneDNN linear"


def why_not_widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """None if `widened` can run, else why not."""
    if (reason := _why_not_plain(x, weight, bias)) is not None:
        return reason
    if weight.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {weight.dtype}"
    return None if products.EMULATED else "this processor has products of bfloat16"


def _why_not_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if not (x.is_cpu and weight.is_cpu):
        return f"it runs on cpu, not {x.device.type}"
    if x.shape[-1] != weight.shape[1]:
        return f"x {list(x.shape)} does not fit the weight {list(weight.shape)}"
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        return f"x is {x.dtype} and the weight {weight.dtype}"
    if type(x) not in _PLAIN or type(weight) not in _PLAIN:
        return f"it takes plain tensors, not {type(x).__name__} and {type(weight).__name__}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast picks the dtype"
    return TRANSFORMED if transformed() else None


_PLAIN = (Tensor, Parameter)


def skinny_each(x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """`skinny` by each of several weights and biases, in one call."""
    if not x.is_contiguous():
        x = x.contiguous()
    *lead, width = x.shape
    maps = [(w, b if b is None or b.is_contiguous() else b.contiguous()) for w, b in maps]
    found, table, size = [], b"", 0
    for weight, bias in maps:
        out = weight.shape[0]
        y = x.new_empty((*lead, out))
        table += _pack(
            weight.data_ptr(), 0, 0 if bias is None else bias.data_ptr(), y.data_ptr(), out, weight.stride(0)
        )
        size += out * width
        found.append(y)
    threads = torch.get_num_threads() if size * x.itemsize > ONE_THREAD else 1
    _kernel(x.dtype)(x.data_ptr(), table, len(found), x.numel() // width, width, threads)
    return found


def _skinny(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return skinny_each(x, [(weight, bias)])[0]


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


skinny = inference_op("linear_skinny", _skinny, _fake)


@operator("linear_onednn")
def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in], weight [out, in] of any strides, float32; differentiable."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


onednn.register_fake(_fake)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    # where rows lie apart, as slices do, the product takes a hundred times longer
    rows, x = grad.flatten(0, -2).contiguous(), x.flatten(0, -2).contiguous()
    return (
        onednn(grad, weight.mT, None) if need_x else None,
        onednn(rows.mT, x.mT, None) if need_weight else None,
        rows.sum(0) if need_bias else None,
    )


onednn.register_autograd(_backward, setup_context=_setup)


@operator("linear_widened")
def widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in], weight [out, in] of any strides, bfloat16; differentiable."""
    return products.mm(x.reshape(-1, x.shape[-1]), weight.mT, bias).view(_fake(x, weight, bias).shape)


widened.register_fake(_fake)


def _widened_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        widened(grad, weight.mT, None) if need_x else None,
        widened(rows.mT, x.reshape(-1, x.shape[-1]).mT, None) if need_weight else None,
        rows.sum(0) if need_bias else None,
    )


widened.register_autograd(_widened_backward, setup_context=_setup)

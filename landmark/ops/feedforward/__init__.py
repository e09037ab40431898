"""Feed-forward functions of a few tokens in one call of a C kernel (few.c), at the speed of reading the weights."""

from __future__ import annotations

from ctypes import c_char_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..activation import ACTIVATIONS
from ..native import Source

SOURCE = Source(Path(__file__).with_name("few.c"))
KERNELS = {torch.float32: "few_f32", torch.bfloat16: "few_bf16"}
KINDS = {name: kind for kind, name in enumerate(ACTIVATIONS)}  # as act.h's enum
MAX_TOKENS = 16  # beyond them the products of many rows are as fast
MAX_BYTES = 2**16  # of all tokens' hidden vectors, beyond which a matrix that all of them pass reads in blocks faster
ONE_THREAD = 2**18  # bytes of weights that a second thread would not read any sooner
_PLAIN = (Tensor, Parameter)
_pack = Struct("7P6q").pack  # few.c's Call


@cache
def _kernel(dtype: torch.dtype) -> Any:
    return SOURCE.function(KERNELS[dtype], c_char_p)


def why_not(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, *biases: Tensor | None) -> str | None:
    """None if the kernel can run on tokens x [..., dim] and weights [out, in], else why not."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gate, up, down, *biases)):
        return "it has no gradient"
    dtype = x.dtype
    if dtype not in KERNELS:
        return f"it takes float32 and bfloat16, not {dtype}"
    if not 0 < (rows := x.numel() // max(1, x.shape[-1])) <= MAX_TOKENS:
        return f"it takes 1 to {MAX_TOKENS} tokens, not {rows}"
    if rows * max(up.shape) * x.itemsize > MAX_BYTES:
        return f"it takes {MAX_BYTES} bytes of hidden vectors that share a matrix"
    for t in (x, gate, up, down, *biases):
        if t is not None and (type(t) not in _PLAIN or not t.is_cpu or t.dtype != dtype):
            return f"it takes plain tensors of one dtype on cpu, not {type(t).__name__} {t.dtype} on {t.device.type}"
        if t is not None and t is not x and not t.is_contiguous():
            return "a weight is not contiguous"
    if torch.compiler.is_compiling():
        return "compilers do not see through it"
    if torch.is_autocast_enabled("cpu"):
        return "autocast picks the dtype"
    return SOURCE.why_not()


def feed_forward(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, act: str, *, up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """down(act(gate(x)) up(x)), or down(act(up(x))) without `gate`, for arguments that `why_not` accepts.

    x [..., dim]; gate, up [hidden, dim], down [out, hidden]; biases [hidden] and [out] -> [..., out].
    """
    x = x.contiguous()
    (hidden, dim), out = up.shape, down.shape[0]
    y = x.new_empty((*x.shape[:-1], out))
    call = _pack(
        x.data_ptr(), 0 if gate is None else gate.data_ptr(), up.data_ptr(), down.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in (up_bias, down_bias)), y.data_ptr(), x.numel() // dim, dim, out,
        hidden, KINDS[act], torch.get_num_threads() if up.nbytes > ONE_THREAD else 1,
    )  # fmt: skip
    _kernel(x.dtype)(call)
    return y

"""The product in C: tiles are widened where they are multiplied, so that no widened matrix is ever written."""

from __future__ import annotations

from ctypes import c_char_p, c_int, c_int64
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from ..native import Source

SOURCE = Source(Path(__file__).with_name("product.c"))
ONE_THREAD = 2**16  # multiplications that two threads would not do any sooner
_pack = Struct("P3q").pack  # product.c's Matrix
_NONE = _pack(0, 0, 0, 0)
_HALF = {torch.float32: 0, torch.bfloat16: 1}


@cache
def _kernel() -> Any:
    return SOURCE.function("product", *[c_char_p] * 4, *[c_int64] * 3, c_int)


def why_not(*tensors: Tensor) -> str | None:
    """None if `product` takes these, else why not."""
    for t in tensors:
        if not t.is_cpu or t.dtype not in _HALF:
            return f"it takes float32 and bfloat16 on cpu, not {t.dtype} on {t.device.type}"
    return SOURCE.why_not()


def product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out = a b + bias, summed in float32; a [m, k], b [k, n], bias [n], out [m, n], of any strides."""
    (m, k), n = a.shape, b.shape[1]
    threads = torch.get_num_threads() if m * k * n > ONE_THREAD else 1
    more = _NONE if bias is None else _pack(bias.data_ptr(), 0, bias.stride(0), _HALF[bias.dtype])
    _kernel()(_matrix(a), _matrix(b), more, _matrix(out), m, k, n, threads)
    return out


def _matrix(t: Tensor) -> bytes:
    return _pack(t.data_ptr(), t.stride(0), t.stride(1), _HALF[t.dtype])

"""Cross-entropy of rows of logits in one C pass: maximum, sum of exponentials, gradient in place."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..native import Source
from .reference import Head

SOURCE = Source(Path(__file__).with_name("softmax.c"))
KERNELS = {torch.float32: "softmax_f32", torch.bfloat16: "softmax_bf16"}
_ARGS = (c_void_p, *[c_int64] * 3, c_void_p, *[c_float] * 4, c_int, *[c_void_p] * 3, c_int)


@cache
def _kernel(dtype: torch.dtype) -> Any:
    return SOURCE.function(KERNELS[dtype], *_ARGS)


def why_not(hidden: Tensor) -> str | None:
    """None if logits of `hidden`'s kind can be reduced here, else why not."""
    if hidden.device.type != "cpu":
        return f"it runs on cpu, not {hidden.device.type}"
    if hidden.dtype not in KERNELS:
        return f"it takes float32 and bfloat16, not {hidden.dtype}"
    return SOURCE.why_not()


def reduce_rows(logits: Tensor, targets: Tensor, head: Head, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """logits [n, V], targets [n] -> nll, lse and mean logit, float32 [n]; `grad` turns logits into their gradient."""
    n, vocab = logits.shape
    assert logits.stride(1) == 1 and targets.is_contiguous() and targets.dtype == torch.int64
    nll, lse, mean = torch.empty(3, n, dtype=torch.float32).unbind()
    _kernel(logits.dtype)(
        logits.data_ptr(), n, vocab, logits.stride(0), targets.data_ptr(), head.scale, head.softcap or 0.0,
        head.label_smoothing, head.z_loss, grad,
        nll.data_ptr(), lse.data_ptr(), mean.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return nll, lse, mean

"""One token of the recurrence for every sequence as a C kernel: what decoding needs."""

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

SOURCE = Source(Path(__file__).with_name("step.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
ONE_THREAD = 2**15  # numbers of the state that a second thread would not finish any sooner
_PLAIN = (Tensor, Parameter)


@cache
def _kernel(dtype: torch.dtype) -> Any:
    return SOURCE.function(f"ssd_step_{SUFFIX[dtype]}", *[c_void_p] * 9, *[c_int64] * 5, c_int)


def why_not(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bounds: Bounds, initial: Tensor | None
) -> str | None:
    """None if the kernel can run, else why not."""
    if not (bounds.dense and bounds.width == 1):
        return "it takes one token of each sequence"
    if learns(x, dt, A, B, C, D, initial):
        return "it has no gradient"
    for t in (x, B, C):
        if type(t) not in _PLAIN or not t.is_cpu or t.dtype not in SUFFIX or t.dtype != x.dtype:
            return (
                f"it takes plain tensors of one dtype, float32 or bfloat16, on cpu, not {type(t).__name__} "
                f"{t.dtype} on {t.device}"
            )
    return "it takes no empty tensors" if not x.numel() else SOURCE.why_not()


def _run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """x [S, H, P], B and C [S, G, N]; the others float32; all contiguous."""
    y, final = torch.empty_like(x), torch.empty_like(initial)
    threads = torch.get_num_threads() if initial.numel() > ONE_THREAD else 1
    _kernel(x.dtype)(
        x.data_ptr(), dt.data_ptr(), A.data_ptr(), B.data_ptr(), C.data_ptr(), D.data_ptr(), initial.data_ptr(),
        final.data_ptr(), y.data_ptr(), *x.shape, *B.shape[1:], threads,
    )  # fmt: skip
    return y, final


def _fake(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(initial)


_step = inference_op("ssd_step", _run, _fake)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bounds: Bounds, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `reference.ssd`, for one token of each sequence."""
    if initial is None:
        initial = torch.zeros(x.shape[0], *B.shape[2:], x.shape[2] // B.shape[2] * x.shape[3])
    few = (t.float().contiguous() for t in (dt[:, 0], A, D, initial))
    step, A, D, initial = few
    y, final = _step(x[:, 0].contiguous(), step, A, B[:, 0].contiguous(), C[:, 0].contiguous(), D, initial)
    return y[:, None], final

"""A decoded token of Mamba (Gu and Dao 2023, sec. 3) between its linear maps at both ends: a C kernel, step.c."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_char_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..native import Source

SOURCE = Source(Path(__file__).with_name("step.c"))
KERNELS = {torch.float32: "step_f32", torch.bfloat16: "step_bf16"}
MAX_TOKENS, MAX_STATES = 16, 256
ONE_THREAD = 2**15  # numbers of states that a second thread would not compute any sooner
_PLAIN = (Tensor, Parameter)
_pack = Struct("17P8q2d").pack  # step.c's Call


@cache
def _kernel(dtype: torch.dtype) -> Any:
    return SOURCE.function(KERNELS[dtype], c_char_p)


def why_not(
    x: Tensor, logs: Tensor, skip: Tensor, ssm: Tensor, *others: Tensor | None
) -> str | None:  # fmt: skip
    """None if the kernel can run on what `step` takes: `others` are all but A, D and the states; else why not."""
    if torch.is_grad_enabled():
        return "it has no gradient"
    dtype = x.dtype
    for t in (x, *others):
        if t is not None and (type(t) not in _PLAIN or not t.is_cpu or t.dtype != dtype or dtype not in KERNELS):
            return f"it takes plain tensors of one dtype, float32 or bfloat16, on cpu, not {type(t).__name__} {t.dtype}"
    if logs.dtype not in KERNELS or logs.dtype != skip.dtype or ssm.dtype != torch.float32:
        return f"it takes A and D of one dtype, and states in float32, not {logs.dtype}, {skip.dtype} and {ssm.dtype}"
    if not 0 < x.shape[0] <= MAX_TOKENS or not 0 < logs.shape[1] <= MAX_STATES:
        return f"it takes 1 to {MAX_TOKENS} tokens and {MAX_STATES} states, not {x.shape[0]} and {logs.shape[1]}"
    if torch.compiler.is_compiling():
        return "compilers do not see through it"
    return SOURCE.why_not()


def step(
    inner: Tensor, taps: Tensor, taps_bias: Tensor | None, choose: Tensor, scales: Sequence[Tensor] | None,
    step_weight: Tensor, step_bias: Tensor, logs: Tensor, skip: Tensor, past: Tensor, ssm: Tensor, *, eps: float = 0.0,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One token of each sequence, for arguments that `why_not` accepts.

    inner [n, 1, 2 C]: x and z; taps [C, K] and their bias [C]; choose [R + 2 N, C]; scales of the RMSNorms of its three
    parts, with their eps and offset; step_weight [C, R] and its bias; logs [C, N] of -A; skip [C]: D; past
    [n, K - 1, C]; ssm [n, N, C]. -> what the output matrix reads [n, 1, C], and past and ssm after it.
    """
    (channels, states), rank, taps_count = logs.shape, step_weight.shape[1], taps.shape[1]
    rows, tokens = inner.contiguous(), inner.shape[0]
    given = [None if t is None else t.contiguous() for t in (taps, taps_bias, past, choose, *(scales or (None,) * 3))]
    rest = [t.contiguous() for t in (step_weight, step_bias, logs, skip, ssm)]
    last, to, y = torch.empty_like(past), torch.empty_like(ssm), inner.new_empty((tokens, 1, channels))
    at = rows.data_ptr()
    call = _pack(
        at, at + channels * rows.itemsize, *(0 if t is None else t.data_ptr() for t in given),
        *(t.data_ptr() for t in rest), last.data_ptr(), to.data_ptr(), y.data_ptr(), tokens, channels, states, rank,
        taps_count, 2 * channels, logs.dtype == torch.bfloat16,
        torch.get_num_threads() if ssm.numel() > ONE_THREAD else 1, eps, offset,
    )  # fmt: skip
    _kernel(rows.dtype)(call)
    return y, last, to

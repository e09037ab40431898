"""Drawing tokens on the processor: a C kernel (draw.c)."""

from __future__ import annotations

from ctypes import c_char_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from ..native import Source

SOURCE = Source(Path(__file__).with_name("draw.c"))
KERNELS = {torch.float32: "draw_f32", torch.bfloat16: "draw_bf16"}
SMALL = 1 << 14  # logits that a second thread would not be through with any sooner
_pack = Struct("8P4q").pack  # draw.c's Call


@cache
def _kernel(dtype: torch.dtype) -> Any:
    return SOURCE.function(KERNELS[dtype], c_char_p)


def why_not(logits: Tensor) -> str | None:
    """None if the kernel can draw from logits [B, V], else why not."""
    if logits.device.type != "cpu" or logits.dtype not in KERNELS:
        return f"it takes float32 and bfloat16 on cpu, not {logits.dtype} on {logits.device.type}"
    if logits.numel() == 0 or logits.stride(1) != 1:
        return "it takes rows that lie in order, and at least one"
    return SOURCE.why_not()


def draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """As `landmark.ops.draw.draw`, for logits that `why_not` accepts and contiguous settings of its dtypes."""
    rows, vocab = logits.shape
    tokens, cuts = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    threads = min(torch.get_num_threads(), rows) if logits.numel() > SMALL else 1
    call = _pack(
        logits.data_ptr(), temperature.data_ptr(), top_p.data_ptr(), min_p.data_ptr(), top_k.data_ptr(),
        uniform.data_ptr(), tokens.data_ptr(), cuts.data_ptr(), rows, vocab, logits.stride(0), threads,
    )  # fmt: skip
    _kernel(logits.dtype)(call)
    return tokens, cuts

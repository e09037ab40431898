"""Products of bfloat16 matrices on a processor that has none.

torch multiplies them number by number there (AVX2, without AVX-512), seven to a hundred times slower than float32. Here
both are widened and multiplied as float32, by a kernel of our own or, piece by piece, by torch; what comes out is
rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu

EMULATED = not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
PIECE = 2**20  # numbers that are widened at a time, so that they are still in a cache when they are multiplied


def widened(*tensors: Tensor) -> bool:
    """Whether the product of these is better made in float32."""
    return EMULATED and all(t.is_cpu and t.dtype == torch.bfloat16 for t in tensors)


def mm(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a b + bias, of a's type; a [m, k], b [k, n], bias [n], `out` [m, n] of any type and strides."""
    if not widened(a, b):
        if out is not None and out.dtype == a.dtype:
            return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
        y = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
        return y if out is None else out.copy_(y)
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1])
    if cpu.why_not(a, b, out, *([] if bias is None else [bias])) is None:
        return cpu.product(a, b, bias, out)
    step = max(1, PIECE // max(1, a.shape[1]))
    more = None if bias is None else bias.float()
    if a.numel() > b.numel():
        whole = b.float()
        for part, rows in zip(out.split(step), a.split(step), strict=True):
            part.copy_(_float32(rows.float(), whole, more))
        return out
    whole = a.float()
    biases = [None] * -(-b.shape[1] // step) if more is None else more.split(step)
    for part, columns, own in zip(out.split(step, 1), b.split(step, 1), biases, strict=True):
        part.copy_(_float32(whole, columns.float(), own))
    return out


def _float32(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)

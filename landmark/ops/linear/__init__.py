"""Linear maps: at memory speed for the few rows of decoding, at full vector width for float32 training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import products
from . import cpu, reference

Backend = Literal["reference", "torch", "skinny", "onednn", "widened"]


def why_not(backend: Backend, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """None if `backend` can run, else why not."""
    if backend == "skinny":
        return cpu.why_not_skinny(x, weight, bias)
    if backend == "onednn":
        return cpu.why_not_onednn(x, weight, bias)
    if backend == "widened":
        return cpu.why_not_widened(x, weight, bias)
    if backend not in ("reference", "torch"):
        raise ValueError(f"unknown backend {backend!r}: use 'reference', 'torch', 'skinny', 'onednn' or 'widened'")
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend | None = None) -> Tensor:
    """y = x W^T + b; x [..., in], weight [out, in], bias [out] -> [..., out], differentiable.

    Without gradient, 1 to 16 rows on the processor are multiplied at the speed of reading the weight.
    """
    if backend is not None:
        if (reason := why_not(backend, x, weight, bias)) is not None:
            raise ValueError(f"backend {backend!r} cannot run: {reason}")
        return _RUN[backend](x, weight, bias)
    if weight.is_cpu:
        if cpu.why_not_skinny(x, weight, bias) is None:
            return cpu.skinny(x, weight, bias)
        if (
            cpu.ONEDNN_IS_FASTER
            and x.numel() * weight.shape[0] >= cpu.MIN_PRODUCT
            and cpu.why_not_onednn(x, weight, bias) is None
        ):
            return cpu.onednn(x, weight, bias)
        if (
            products.EMULATED
            and x.numel() * weight.shape[0] >= cpu.MIN_WIDENED
            and cpu.why_not_widened(x, weight, bias) is None
        ):
            return cpu.widened(x, weight, bias)
    return F.linear(x, weight, bias)


def linears(x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """`linear` by each of several weights and biases, for few rows of x in one call."""
    if all(w.is_cpu and cpu.why_not_skinny(x, w, b) is None for w, b in maps) and not torch.compiler.is_compiling():
        return cpu.skinny_each(x, maps)
    return [linear(x, weight, bias) for weight, bias in maps]


_RUN: dict[Backend, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "reference": reference.linear,
    "torch": F.linear,
    "skinny": cpu.skinny,
    "onednn": cpu.onednn,
    "widened": cpu.widened,
}

__all__ = ["Backend", "linear", "linears", "reference", "why_not"]

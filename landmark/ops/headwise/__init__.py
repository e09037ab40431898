"""A linear map of its own for every head."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import cpu, reference

Backend = Literal["reference", "torch", "cpu"]


def why_not(backend: Backend, x: Tensor, weight: Tensor) -> str | None:
    """None if `backend` can run, else why not."""
    if backend not in _RUN:
        raise ValueError(f"unknown backend {backend!r}: use 'reference', 'torch' or 'cpu'")
    return cpu.why_not(x, weight) if backend == "cpu" else None


def headwise(x: Tensor, weight: Tensor, *, backend: Backend | None = None) -> Tensor:
    """y_h = W_h x_h; x [..., heads, in], weight [heads, out, in] of any strides -> [..., heads, out], differentiable.

    Without gradient, 1 to 16 rows on the processor are multiplied at the speed of reading the weight.
    """
    if x.ndim < 2 or weight.ndim != 3 or x.shape[-2:] != (weight.shape[0], weight.shape[2]):
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} must be [..., H, in] and [H, out, in]")
    if backend is None:
        backend = "torch" if cpu.why_not(x, weight) else "cpu"
    elif (reason := why_not(backend, x, weight)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return _RUN[backend](x, weight)


def _batched(x: Tensor, weight: Tensor) -> Tensor:
    """One product a head, of a weight that is not copied."""
    y = x.flatten(0, -3).transpose(0, 1) @ weight.mT
    return y.transpose(0, 1).unflatten(0, x.shape[:-2])


_RUN = {"reference": reference.headwise, "torch": _batched, "cpu": cpu.headwise}

__all__ = ["Backend", "headwise", "reference", "why_not"]

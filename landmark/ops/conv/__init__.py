"""Causal depthwise convolutions: each channel's last K tokens, weighed. What short-range mixing is made of (Mamba)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ...ctx import Bounds
from . import cpu, reference, shifts

Backend = Literal["reference", "torch", "cpu"]


def why_not(
    backend: Backend, x: Tensor, weight: Tensor, bias: Tensor | None = None, initial: Tensor | None = None
) -> str | None:
    """None if `backend` can run, else why not."""
    if backend not in _RUN:
        raise ValueError(f"unknown backend {backend!r}: use 'reference', 'torch' or 'cpu'")
    return cpu.why_not(x, weight, bias, initial) if backend == "cpu" else None


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, bounds: Bounds, initial: Tensor | None = None,
    act: Literal["silu"] | None = None, *, backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y[t] = act(bias + sum over k of weight[k] x[t - (K - 1) + k]), within each sequence of the batch.

    x [B, T, C], weight [C, K], bias [C]; initial [sequences, K - 1, C] is what came before each sequence (None:
    zeros). Returns y [B, T, C], 0 outside of all sequences, and the last K - 1 tokens of each sequence, as initial.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} must be [B, T, C] and [C, K]")
    if act not in (None, "silu"):
        raise ValueError(f"act is {act!r}; use 'silu' or None")
    if backend is None:
        backend = "torch" if cpu.why_not(x, weight, bias, initial) else "cpu"
    elif (reason := why_not(backend, x, weight, bias, initial)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return _RUN[backend](x, weight, bias, bounds, initial, act == "silu")


_RUN = {"reference": reference.causal_conv, "torch": shifts.causal_conv, "cpu": cpu.causal_conv}

__all__ = ["Backend", "causal_conv", "reference", "why_not"]

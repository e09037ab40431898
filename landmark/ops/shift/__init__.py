"""Token shift: every token mixed with the one before it, in several ways at once (RWKV)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ...ctx import Bounds
from . import cpu, reference

Backend = Literal["reference", "cpu"]


def why_not(backend: Backend, x: Tensor, mix: Tensor, initial: Tensor | None = None) -> str | None:
    """None if `backend` can run, else why not."""
    if backend not in _RUN:
        raise ValueError(f"unknown backend {backend!r}: use 'reference' or 'cpu'")
    return cpu.why_not(x, mix, initial) if backend == "cpu" else None


def token_mix(
    x: Tensor, mix: Tensor, bounds: Bounds, initial: Tensor | None = None, *, backend: Backend | None = None
) -> tuple[list[Tensor], Tensor]:
    """y_n[t] = x[t] + (x[t - 1] - x[t]) mix_n, within each sequence of the batch; what comes before it is `initial`.

    x [B, T, C], mix [n, C], initial [sequences, C] (None: zeros). Returns n tensors [B, T, C], 0 outside of all
    sequences, and the last token of each sequence [sequences, C] (its `initial`, if the sequence is empty).
    """
    if x.ndim != 3 or mix.ndim != 2 or mix.shape[1] != x.shape[2]:
        raise ValueError(f"x {list(x.shape)} and mix {list(mix.shape)} must be [B, T, C] and [n, C]")
    if backend is None:
        backend = "reference" if cpu.why_not(x, mix, initial) else "cpu"
    elif (reason := why_not(backend, x, mix, initial)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return _RUN[backend](x, mix, bounds, initial)


_RUN = {"reference": reference.token_mix, "cpu": cpu.token_mix}

__all__ = ["Backend", "reference", "token_mix", "why_not"]

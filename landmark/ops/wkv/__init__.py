"""WKV: the weighted average of past values that RWKV-4 has in place of attention."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ...ctx import Bounds
from . import chunked, cpu, reference

Backend = Literal["reference", "chunked", "cpu"]


def why_not(backend: Backend, k: Tensor, v: Tensor) -> str | None:
    """None if `backend` can run, else why not."""
    if backend not in _RUN:
        raise ValueError(f"unknown backend {backend!r}: use 'reference', 'chunked' or 'cpu'")
    return cpu.why_not(k, v) if backend == "cpu" else None


def wkv(
    k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, bounds: Bounds, initial: Tensor | None = None,
    *, backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y_t = (sum over s < t of e^((t-1-s) w + k_s) v_s + e^(u+k_t) v_t) / (the same without v), for every channel.

    k and v [B, T, C], log_decay w [C] below 0 and bonus u [C]; initial [sequences, 3, C] is the state of each sequence
    (None, or zeros: nothing was seen). Returns y [B, T, C], 0 outside of all sequences, and the states after it, in at
    least float32: sum of values, sum of weights, and the logarithm of the unit of both. Source: 2305.13048, eq. 16.
    """
    if k.shape != v.shape or k.ndim != 3 or not k.shape[2:] == log_decay.shape == bonus.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (k, v, log_decay, bonus))
        raise ValueError(f"k, v, log_decay and bonus are {shapes}: they must be twice [B, T, C] and twice [C]")
    if backend is None:
        backend = "chunked" if cpu.why_not(k, v) else "cpu"
    elif (reason := why_not(backend, k, v)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return _RUN[backend](k, v, log_decay, bonus, bounds, initial)


_RUN = {"reference": reference.wkv, "chunked": chunked.wkv, "cpu": cpu.wkv}

__all__ = ["Backend", "reference", "why_not", "wkv"]

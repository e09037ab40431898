"""The selective scan: a diagonal state space model whose step and matrices depend on the token (Mamba)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ...ctx import Bounds
from . import chunked, cpu, reference, step

Backend = Literal["reference", "chunked", "cpu"]


def why_not(backend: Backend, x: Tensor, *others: Tensor | None, states: int = 16) -> str | None:
    """None if `backend` can run on x and what else has a row for every token (delta, B, C, z), else why not."""
    if backend not in _RUN:
        raise ValueError(f"unknown backend {backend!r}: use 'reference', 'chunked' or 'cpu'")
    return cpu.why_not(x, *others, states=states) if backend == "cpu" else None


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, bounds: Bounds,
    initial: Tensor | None = None, *, backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h_t = exp(d_t A) h_{t-1} + d_t B_t x_t, y_t = (C_t h_t + D x_t) silu(z_t), with d_t = softplus(delta_t).

    x, delta and z (None: no gate) [B, T, C], A [C, N], B and C [B, T, N], D [C]; initial [sequences, N, C] is the state
    of each sequence (None: zeros). Returns y [B, T, C], 0 outside of all sequences, and the states after it, in at
    least float32. Source: 2312.00752, algorithm 2; for backward, states are computed again from one in 32.
    """
    if delta.shape != x.shape or A.shape[0] != x.shape[2] or B.shape != C.shape or B.shape[2] != A.shape[1]:
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in zip("xdABC", (x, delta, A, B, C), strict=True))
        raise ValueError(f"{shapes}: they must be twice [B, T, C], [C, N] and twice [B, T, N]")
    rows = delta, z, B, C
    if backend is None:
        backend = "chunked" if cpu.why_not(x, *rows, states=A.shape[1]) else "cpu"
    elif (reason := why_not(backend, x, *rows, states=A.shape[1])) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return _RUN[backend](x, delta, A, B, C, D, z, bounds, initial)


_RUN = {"reference": reference.selective_scan, "chunked": chunked.selective_scan, "cpu": cpu.selective_scan}

__all__ = ["Backend", "reference", "selective_scan", "step", "why_not"]

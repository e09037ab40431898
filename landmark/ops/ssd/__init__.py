"""State space duality (Dao and Gu 2024, 2405.21060): a recurrence, masked attention and chunks."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from ...ctx import Bounds
from . import chunked, cpu, reference, step

Backend = Literal["reference", "quadratic", "chunked", "cpu", "step"]
CHUNK = 64


def why_not(
    backend: Backend, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bounds: Bounds,
    initial: Tensor | None = None,
) -> str | None:  # fmt: skip
    """None if `backend` can run, else why not."""
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}: use 'reference', 'quadratic', 'chunked', 'cpu' or 'step'")
    if backend == "step":
        return step.why_not(x, dt, A, B, C, D, bounds, initial)
    return cpu.why_not(x, B, C) if backend == "cpu" else None


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bounds: Bounds, initial: Tensor | None = None,
    *, chunk: int = CHUNK, backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T and y_t = h_t^T C_t + D x_t, for every head, within each sequence.

    x [B, T, H, P], dt [B, T, H] above 0, A [H] below 0, B and C [B, T, G, N] for G groups of heads, D [H]; initial
    [sequences, G, N, H / G * P] is the state of each sequence (None: zeros). Returns y [B, T, H, P], 0 outside of all
    sequences, and the states after it, in at least float32. `chunk` tokens meet as in attention.
    """
    heads, groups = x.shape[2], B.shape[2]
    if dt.shape != x.shape[:3] or B.shape != C.shape or heads % groups:
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in zip(("x", "dt", "B", "C"), (x, dt, B, C), strict=True))
        raise ValueError(f"{shapes}: they must be [B, T, H, P], [B, T, H] and twice [B, T, G, N], where G divides H")
    if backend is None:
        one = step.why_not(x, dt, A, B, C, D, bounds, initial) is None
        backend = "step" if one else "chunked" if cpu.why_not(x, B, C) else "cpu"
    elif (reason := why_not(backend, x, dt, A, B, C, D, bounds, initial)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    if backend == "chunked":
        return chunked.ssd(x, dt, A, B, C, D, bounds, initial, chunk)
    if backend == "cpu":
        return cpu.ssd(x, dt, A, B, C, D, bounds, initial, chunk)
    if backend == "step":
        return step.ssd(x, dt, A, B, C, D, bounds, initial)
    form = reference.quadratic if backend == "quadratic" else reference.recurrent
    return reference.ssd(x, dt, A, B, C, D, bounds, initial, form)


__all__ = ["CHUNK", "Backend", "reference", "ssd", "why_not"]

"""Remembered matrices, decayed channel by channel and corrected: linear attention with decay, the delta rule."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...ctx import Bounds
from . import chunked, cpu, goose, reference

Backend = Literal["reference", "chunked", "cpu"]


def why_not(backend: Backend, r: Tensor, *others: Tensor | None) -> str | None:
    """None if `backend` can run on r and what else has a row for every token (k, v, a, b), else why not."""
    if backend not in _RUN:
        raise ValueError(f"unknown backend {backend!r}: use 'reference', 'chunked' or 'cpu'")
    return cpu.why_not(r, *others) if backend == "cpu" else None


def delta_rule(
    r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, bounds: Bounds, initial: Tensor | None = None,
    *, a: Tensor | None = None, b: Tensor | None = None, backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """S_t = (diag(w_t) + b_t a_t^T) S_{t-1} + k_t v_t^T and y_t = S_t^T r_t, for every head, with w = exp(log_decay).

    Without a and b, y_t = S_{t-1}^T r_t: a token reads what was known before it (RWKV-5 and -6, 2404.05892, eq. 18 and
    19, whose bonus for the token itself is added outside); with them it is the generalised delta rule of RWKV-7
    (2503.14456, eq. 17 and 18). r, log_decay (at most 0), k, v, a, b [B, T, H, N]; initial [sequences, H, N, N] is S
    of each sequence, keys by values (None: zeros). Returns y [B, T, H, N], 0 outside of all sequences, and the states
    after it, in at least float32.
    """
    if (a is None) != (b is None):
        raise ValueError("a and b go together: give both or none")
    rows = [k, v] if a is None or b is None else [k, v, a, b]
    for t in (log_decay, *rows):
        if t.shape != r.shape or r.ndim != 4:
            raise ValueError(f"r is {list(r.shape)} and what goes with it {list(t.shape)}: all must be [B, T, H, N]")
    if backend is None:
        backend = "chunked" if cpu.why_not(r, *rows) else "cpu"
    elif (reason := why_not(backend, r, *rows)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return _RUN[backend](r, log_decay, k, v, a, b, bounds, initial)


def with_bonus(y: Tensor, r: Tensor, k: Tensor, v: Tensor, bonus: Tensor) -> Tensor:
    """y_t + (sum over n of r_t k_t bonus) v_t: what a token is to itself. r, k, v, y [B, T, H, N], bonus [H, N]."""
    return torch.addcmul(y, (r * k * bonus).sum(-1, keepdim=True), v)


_RUN = {"reference": reference.delta_rule, "chunked": chunked.delta_rule, "cpu": cpu.delta_rule}

__all__ = ["Backend", "delta_rule", "goose", "reference", "why_not", "with_bonus"]

"""Latent attention's step from the linear maps to the cache, the keys' matrix absorbed by the queries."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import cpu, reference

Backend = Literal["reference", "cpu"]


def why_not(backend: Backend, q: Tensor, down: Tensor, weight: Tensor, scale: Tensor, cos: Tensor) -> str | None:
    """None if `backend` can run, else why not."""
    if backend not in _RUN:
        raise ValueError(f"unknown backend {backend!r}: use 'reference' or 'cpu'")
    return cpu.why_not(q, down, weight, scale, cos) if backend == "cpu" else None


def absorb(
    q: Tensor, down: Tensor, weight: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, *, eps: float, offset: float,
    interleaved: bool, backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Queries that look for latent vectors, and what is kept of each token (DeepSeek-V2, 2024, sec. 2.1.2, eq. 9-19).

    q [B, T, heads, head_dim + rope_dim]; down [B, T, rank + rope_dim]: the latent vector, which gets an RMSNorm of
    `scale` [rank] and `offset`, and the key's part that is turned by cos, sin [B or 1, T, rope_dim / 2]; weight
    [heads, head_dim, rank]: that of the keys. -> [B, T, heads, rank + rope_dim] and [B, T, 1, rank + rope_dim].
    """
    rope_dim, rank = 2 * cos.shape[-1], weight.shape[2]
    if q.shape[-1] != weight.shape[1] + rope_dim or down.shape[-1] != rank + rope_dim or q.shape[2] != len(weight):
        raise ValueError(
            f"q {list(q.shape)}, down {list(down.shape)} and weight {list(weight.shape)} must be "
            f"[B, T, H, d + {rope_dim}], [B, T, r + {rope_dim}] and [H, d, r]"
        )
    if backend is None:
        backend = "reference" if cpu.why_not(q, down, weight, scale, cos) else "cpu"
    elif (reason := why_not(backend, q, down, weight, scale, cos)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return _RUN[backend](q, down, weight, scale, cos, sin, eps, offset, interleaved)


_RUN = {"reference": reference.absorb, "cpu": cpu.absorb}

__all__ = ["Backend", "absorb", "reference", "why_not"]

"""Drawing tokens from logits: what may be drawn is one threshold a row, what is drawn one random number a row."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import cpu, reference

Backend = Literal["reference", "cpu"]


def why_not(backend: Backend, logits: Tensor) -> str | None:
    """None if `backend` can draw from logits [B, V], else why not."""
    if backend not in ("reference", "cpu"):
        raise ValueError(f"unknown backend {backend!r}: use 'reference' or 'cpu'")
    return cpu.why_not(logits) if backend == "cpu" else None


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens [B] of logits [B, V], and the logit of each row [B] below which none could have been drawn.

    `temperature` [B] divides the logits; 0 takes the first of the likeliest tokens. `top_k` [B] (int64; 0: all) keeps
    the k most likely tokens (Fan et al. 2018), of these `top_p` [B] the smallest set of at least that mass (Holtzman
    et al. 2020), of these `min_p` [B] those of at least that share of the likeliest one's probability (Nguyen et al.
    2024). Tokens that tie with the last one kept stay. The token is the one at which the cumulated probability reaches
    `uniform` [B] (float64, in (0, 1]); it is V where a row has a NaN or nothing above -inf. Settings are float32.
    """
    if backend is not None and (reason := why_not(backend, logits)) is not None:
        raise ValueError(f"draw backend {backend!r} cannot run: {reason}")
    if backend == "cpu" or (backend is None and cpu.why_not(logits) is None):
        return cpu.draw(logits, temperature, top_k, top_p, min_p, uniform)
    return reference.draw(logits, temperature, top_k, top_p, min_p, uniform)


__all__ = ["Backend", "draw", "reference", "why_not"]

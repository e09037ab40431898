"""Parameter-efficient expert retrieval (He 2024): the best of n^2 product keys, and experts of one neuron each."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ..activation import activation
from ..linear import linear
from . import cpu, reference

Backend = Literal["reference", "cpu"]


def why_not(backend: Backend, x: Tensor, table: Tensor) -> str | None:
    """None if `backend` can mix experts of a table for x, else why not."""
    if backend not in ("reference", "cpu"):
        raise ValueError(f"unknown backend {backend!r}: use 'reference' or 'cpu'")
    return cpu.why_not(x, table) if backend == "cpu" else None


def product_topk(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of n^2 keys (c_i, c'_j), exactly, from 2 n scores (Lample et al. 2019, sec. 3.1).

    queries [..., d], keys [2, n, d / 2] -> scores [..., k], largest first and differentiable, and numbers i n + j.
    Only pairs whose ranks a, b (from 1) have a b <= k can be among the k best: as many pairs as these are no worse.
    """
    n = keys.shape[1]
    if not 1 <= k <= n * n:
        raise ValueError(f"k is {k}; it must be from 1 to the number of keys, {n * n}")
    firsts, seconds = (
        linear(query, half).topk(min(k, n), -1) for query, half in zip(queries.chunk(2, -1), keys, strict=True)
    )
    a, b = _pairs(k, n, queries.device)
    pairs = firsts.values[..., a] + seconds.values[..., b]
    best = pairs.topk(k, -1)
    numbers = firsts.indices[..., a] * n + seconds.indices[..., b]
    return best.values, numbers.gather(-1, best.indices)


@cache
def _pairs(k: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks, from 0, of the pairs that can be among the k best."""
    ranks = range(1, min(k, n) + 1)
    pairs = torch.tensor([(a - 1, b - 1) for a in ranks for b in ranks if a * b <= k], device=device)
    return pairs[:, 0], pairs[:, 1]


def mix_experts(
    x: Tensor, u: Tensor, v: Tensor, at: Tensor, weights: Tensor, act: str, *, backend: Backend | None = None
) -> Tensor:
    """The sum over a token's experts i of weight_i act(u_i . x) v_i (eq. 3 and 6).

    x [N, D], tables u, v [E, D], at [N, m] with numbers of experts, weights [N, m] -> [N, D]. Memory is read for the
    experts that are named and no others.
    """
    if backend is not None and (reason := why_not(backend, x, u)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    run = cpu if backend != "reference" and cpu.why_not(x, u) is None else reference
    hidden = activation(act)(run.gather_dot(x, u, at))
    y: Tensor = run.gather_sum(hidden * weights, v, at)
    return y


__all__ = ["Backend", "mix_experts", "product_topk", "why_not"]

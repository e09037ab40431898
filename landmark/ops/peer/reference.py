"""PEER (He 2024, 2407.04153, eq. 1 to 7), written plainly: every expert is scored, and those chosen are gathered."""

from __future__ import annotations

from torch import Tensor


def product_topk(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All n^2 scores q . (c_i, c'_j), and the k largest: values and numbers i n + j, [..., k] each, largest first."""
    first, second = (q @ c.mT for q, c in zip(queries.chunk(2, -1), keys, strict=True))
    scores = (first[..., :, None] + second[..., None, :]).flatten(-2)
    top = scores.topk(k, -1)
    return top.values, top.indices


def gather_dot(x: Tensor, table: Tensor, at: Tensor) -> Tensor:
    """x [N, D], table [E, D], at [N, m] -> x . table[at], [N, m]."""
    return (table[at] @ x[:, :, None])[..., 0]


def gather_sum(a: Tensor, table: Tensor, at: Tensor) -> Tensor:
    """a [N, m], table [E, D], at [N, m] -> the sum of a table[at], [N, D]."""
    return (a[:, None].to(table.dtype) @ table[at])[:, 0]

"""Mixture of experts: rows sorted by expert, one product for all experts, and every token's answers put together.

    plan = Plan.of(experts, E)                        # experts [N, k]: which experts each token goes to
    y = grouped_linear(spread(x, plan), weight, plan.counts)
    out = combine(y, weights, plan)                   # weights [N, k]

`experts` is all of that for the few tokens of decoding in one call, and `choose` what a router does for them.

The cost follows the rows that are routed: there is no [tokens, experts, capacity] tensor anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..native import transformed
from . import choose, experts, loop, native, reference, rows

Backend = Literal["reference", "loop", "native", "grouped_mm"]


@dataclass(frozen=True)
class Plan:
    """Where each token's rows lie once rows are sorted by expert; M of the N * k are kept."""

    counts: Tensor  # [E]: rows of each expert
    tokens: Tensor  # [M]: the token of each row
    places: Tensor  # [N, k]: the row of each token's choices; -1 for a choice that is dropped

    @classmethod
    def of(cls, experts: Tensor, count: int, *, dropping: bool = False) -> Plan:
        """From experts [N, k]; if `dropping`, numbers below zero are choices to drop, else there must be none."""
        if rows.why_not_plan(experts) is None:
            return cls(*rows.plan(experts, count, dropping))
        flat = experts.flatten()
        if dropping:
            flat = torch.where(flat < 0, count, flat)
        ordered, order = flat.sort(stable=True)
        ends = torch.searchsorted(ordered, torch.arange(count, device=flat.device), right=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(flat.numel(), device=flat.device))
        if dropping:
            places = torch.where(experts.flatten() < 0, -1, places)
            order = order[: int(ends[-1])]
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        return cls(counts, order // experts.shape[1], places.view_as(experts))


def why_not(backend: Backend, x: Tensor, weight: Tensor) -> str | None:
    """None if `backend` can run, else why not."""
    if backend == "grouped_mm":
        return loop.why_not_grouped_mm(x, weight)
    if backend == "native":
        return native.why_not(x, weight)
    if backend not in ("reference", "loop"):
        raise ValueError(f"unknown backend {backend!r}: use 'reference', 'loop', 'native' or 'grouped_mm'")
    return None


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, *, backend: Backend | None = None) -> Tensor:
    """y = x W_e^T for the rows of every expert e; differentiable.

    x [M, in], whose rows are sorted by expert; weight [E, out, in]; counts [E] (integers, sum M) -> [M, out].
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or counts.shape != weight.shape[:1]:
        raise ValueError(
            f"x {list(x.shape)}, weight {list(weight.shape)}, counts {list(counts.shape)}: "
            "they must be [M, in], [E, out, in] and [E]"
        )
    if backend is not None and (reason := why_not(backend, x, weight)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return _RUN[backend or _pick(x, weight)](x, weight, counts)


def _pick(x: Tensor, weight: Tensor) -> Backend:
    if transformed():
        return "reference"
    if x.is_cuda:
        return "grouped_mm" if loop.why_not_grouped_mm(x, weight) is None else "loop"
    return "native" if native.why_not(x, weight) is None else "loop"


_RUN: dict[Backend, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "reference": reference.grouped_linear,
    "loop": loop.grouped_loop,
    "native": native.grouped_native,
    "grouped_mm": loop.grouped_mm,
}


def spread(x: Tensor, plan: Plan) -> Tensor:
    """x [N, dim] -> [M, dim]: a row for every choice that is kept, sorted by expert."""
    return rows.spread(x, plan.tokens, plan.places) if rows.why_not(x) is None else reference.spread(x, plan.tokens)


def combine(y: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """y [M, dim], weights [N, k] -> [N, dim]: sum_j weights[n, j] y[row of token n's choice j]; 0 for dropped ones."""
    if rows.why_not(y, weights) is None:
        return rows.combine(y, weights, plan.places)
    return reference.combine(y, weights, plan.places)


__all__ = ["Backend", "Plan", "choose", "combine", "experts", "grouped_linear", "reference", "spread", "why_not"]

"""RoFormer (Su et al. 2021): a score between rotated queries and keys depends on their distance alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...ctx import Bounds, Ctx
from ...nn.attention import Attention
from ...nn.position import LearnedPositions, SinusoidalPositions
from ...nn.rope import Rope
from ...nn.rope_scaling import base_frequencies
from ..experiment import Curve, Experiment, Finding, Outcome, Plot, Verdict, equal, reaches
from ..lab import Cell, Lab, column

DIM, LENGTH = 64, 32
SHIFTS = (1, 7, 100, 4_096, 100_000)
ROTARY = {
    "half-split": Rope.Config(),
    "interleaved": Rope.Config(interleaved=True),
    "partial": Rope.Config(dim=DIM // 2),
}
ABSOLUTE = {"learned": LearnedPositions.Config(size=max(SHIFTS) + LENGTH), "sinusoidal": SinusoidalPositions.Config()}


def at(first: int) -> Ctx:
    """A text whose first token stands at this position."""
    return Ctx(torch.arange(first, first + LENGTH)[None], Bounds(1, LENGTH))


def change(scores: Callable[[Ctx], Tensor]) -> float:
    """How far shifts of the whole text change its scores, relative to the largest of them."""
    here = scores(at(0))
    return max(((scores(at(s)) - here).abs().max() / here.abs().max()).item() for s in SHIFTS)


def shift(kind: str, seed: int) -> Cell:
    """One random text in float64: its scores (and what a layer makes of it) at its place and at others."""
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, LENGTH, 4, DIM, dtype=torch.float64)

    def rotated(rope: Rope, ctx: Ctx) -> Tensor:
        return torch.einsum("bihd,bjhd->bhij", rope(q, ctx), rope(k, ctx))

    if kind in ROTARY:
        layer = Attention.Config(heads=4, kv_heads=4, head_dim=DIM, rope=ROTARY[kind]).build(DIM).double()
        x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
        with torch.no_grad():
            return {
                "scores": change(partial(rotated, ROTARY[kind].build(DIM))),
                "layer": change(lambda ctx: layer(x, ctx)),
                "moved": moved(ROTARY[kind].build(DIM), q, k),
            }
    positions = ABSOLUTE[kind].build(DIM)
    if isinstance(positions, LearnedPositions):
        nn.init.normal_(positions.table.weight)

    def added(ctx: Ctx) -> Tensor:
        p = positions(ctx.positions, torch.float64).double()[:, :, None]
        return torch.einsum("bihd,bjhd->bhij", q + p, k + p)

    with torch.no_grad():
        return {"scores": change(added)}


def moved(rope: Rope, q: Tensor, k: Tensor) -> float:
    """How far the scores change if the keys alone move by one: what a score has to know."""
    here = torch.einsum("bihd,bjhd->bhij", rope(q, at(0)), rope(k, at(0)))
    there = torch.einsum("bihd,bjhd->bhij", rope(q, at(0)), rope(k, at(1)))
    return ((there - here).abs().max() / here.abs().max()).item()


def bound(head_dim: int, distances: Tensor) -> Tensor:
    """The mean of |S_1| ... |S_d/2|, S_j = sum of exp(i m theta_k) for k < j, at distances m (sec. 3.4.3): a factor of
    the largest score that two vectors can have there."""
    angles = distances[:, None].double() * base_frequencies(10_000.0, head_dim)
    sums = torch.polar(torch.ones_like(angles), angles).cumsum(1).abs()
    return sums.mean(1)


def run(lab: Lab) -> Outcome:
    seeds = range(100) if lab.full else lab.seeds
    cells = lab.grid(shift, [{"kind": k, "seed": s} for k in (*ROTARY, *ABSOLUTE) for s in seeds])
    where = f"shifts of up to {max(SHIFTS):,} tokens, {len(seeds)} texts"
    findings = [
        equal(
            f"the score depends on the distance alone ({kind} pairs)", "eq. 16", f"scores under {where}",
            max(column(cells, "scores", kind=kind)), 1e-12,
        )
        for kind in ROTARY
    ]  # fmt: skip
    layers = [x for kind in ROTARY for x in column(cells, "layer", kind=kind)]
    findings.append(
        equal("so does all that an attention layer says", "eq. 16", f"outputs under {where}", max(layers), 1e-12)
    )
    distances = torch.arange(1, 257)
    bounds = {d: bound(d, distances) for d in (32, 64, 128)}
    decay = max((b[192:].mean() / b[:64].mean()).item() for b in bounds.values())
    findings += [
        Finding(
            "scores between far tokens are bounded more tightly than between near ones (long-term decay)",
            "sec. 3.4.3, figure 2",
            f"bound at distances 193 to 256 at most {decay:.3f} of that at 1 to 64, for heads of 32, 64 and 128",
            Verdict.shown if decay < 1 else Verdict.contradicted,
        ),
        *(
            reaches(
                f"{kind} positions that are added to the embedding do tell a shift", "ours", "change of the scores",
                column(cells, "scores", kind=kind), 0.01, control=True,
            )
            for kind in ABSOLUTE
        ),
        reaches(
            "the score does depend on the distance", "ours", "change of the scores if keys move by one token",
            column(cells, "moved", kind="half-split"), 0.01, control=True,
        ),
    ]  # fmt: skip
    table = [{"positions": k, "largest change": max(column(cells, "scores", kind=k))} for k in (*ROTARY, *ABSOLUTE)]
    curves = [Curve(f"heads of {d}", distances.tolist(), [(b / b[0]).tolist()]) for d, b in bounds.items()]
    plot = Plot("Long-term decay", "distance", "bound on a score, relative to neighbours", curves)
    return Outcome(findings, table, plot, "float64; angles are the exact product of position and frequency.")


EXPERIMENT = Experiment("E5", "rope", "Rotated scores depend on the distance alone", run, minutes=0.3)

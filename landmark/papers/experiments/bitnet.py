"""BitNet b1.58 (Ma et al. 2024): how far ternary weights are from full precision, at three sizes."""

from __future__ import annotations

import torch

from ...models.decoder import Decoder
from ...models.inspect import count
from ...transforms.bitnet import bitnet
from ..experiment import Curve, Experiment, Outcome, Plot, exceeds
from ..lab import Cell, Lab, column
from ..learn import learn, loss
from ..small import decoder
from ..text import ByteText, held_out

DIMS, LAYERS, LENGTH = (32, 64, 128), 2, 64
LR = {32: 5e-3, 64: 5e-3, 128: 3e-3}  # the best of two for a model of full precision


def train_both(dim: int, steps: int, seed: int) -> Cell:
    """One initialisation, trained in full precision and with ternary maps; and the former, rounded afterwards."""
    text = held_out(512, LENGTH)

    def start() -> Decoder:
        return decoder(dim=dim, layers=LAYERS, seed=seed)

    def trained(model: Decoder) -> Decoder:
        learn(model, ByteText(16, LENGTH, seed), steps=steps, lr=LR[dim], seed=seed)
        return model

    full = trained(start())
    ternary = trained(as_ternary(start()))
    return {
        "full": loss(full, text),
        "ternary": loss(ternary, text),
        "rounded": loss(as_ternary(full), text),
        "parameters": count(full),
    }


def as_ternary(model: Decoder) -> Decoder:
    made = bitnet(model)
    assert isinstance(made, Decoder)
    return made.requires_grad_(True)


def run(lab: Lab) -> Outcome:
    steps = 6000 if lab.full else 1200
    cells = lab.grid(train_both, [{"dim": d, "steps": steps, "seed": s} for s in lab.seeds for d in DIMS])
    nats = {(kind, d): column(cells, kind, dim=d) for kind in ("full", "ternary", "rounded") for d in DIMS}
    gap = {d: [t - f for t, f in zip(nats["ternary", d], nats["full", d], strict=True)] for d in DIMS}
    small, middle, large = DIMS
    findings = [
        exceeds(
            f"the gap of ternary to full precision is smaller at width {b} than at {a}", "table 1",
            f"nats per byte that ternary is worse by at {a} and {b}", gap[a], gap[b],
        )
        for a, b in ((small, middle), (middle, large), (small, large))
    ] + [
        exceeds(
            f"a small ternary model (width {d}) is still worse than one of full precision", "table 1",
            "nats per byte of ternary and full precision", nats["ternary", d], nats["full", d],
        )
        for d in DIMS
    ] + [
        exceeds(
            f"rounding after training is worse than training ternary weights (width {d})", "ours",
            "nats per byte, rounded and trained", nats["rounded", d], nats["ternary", d], control=True,
        )
        for d in DIMS
    ]  # fmt: skip
    sizes = [int(column(cells, "parameters", dim=d)[0]) for d in DIMS]
    table = [
        {
            "width": d,
            "parameters": size,
            **{kind: sum(nats[kind, d]) / len(gap[d]) for kind in ("full", "ternary", "rounded")},
            "gap": sum(gap[d]) / len(gap[d]),
        }
        for d, size in zip(DIMS, sizes, strict=True)
    ]
    curve = Curve("ternary - full precision", sizes, torch.tensor([gap[d] for d in DIMS]).T.tolist())
    plot = Plot(f"{steps} updates of 1,024 bytes", "parameters", "nats per byte", [curve], log_x=True)
    note = "Both trainings of a width see the same batches at the same rate; embedding and head are not ternary."
    return Outcome(findings, table, plot, note)


EXPERIMENT = Experiment("E13", "bitnet", "Ternary weights, trained, at three sizes", run, minutes=8)

"""GLaM (Du et al. 2021): every other layer sparse, two experts a token, limited capacity and a loss for even loads."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...config import ModuleConfig
from ...models.decoder import Decoder
from ...models.inspect import count, forward_flops
from ...nn.feedforward import GLU
from ...nn.moe import MoE
from ...nn.router_capacity import GShard
from ..experiment import Experiment, Outcome, exceeds, stays_below
from ..lab import Cell, Lab, column
from ..learn import learn, loss
from ..small import decoder
from ..text import ByteText, held_out

DIM, LENGTH, LR = 64, 64, 5e-3
DENSE = GLU.Config(hidden=128)
ROUTER = GShard.Config(capacity_factor=1.25, balance=0.01, random_second=False)
SECOND: dict[str, ModuleConfig] = {  # the feed-forward of the second layer
    "dense": DENSE,
    "GLaM": MoE.Config(experts=8, active=2, hidden=62, router=ROUTER),
    "no auxiliary loss": MoE.Config(experts=8, active=2, hidden=62, router=replace(ROUTER, balance=0.0)),
    "2 experts": MoE.Config(experts=2, active=2, hidden=63, router=ROUTER),
}


def build(variant: str, seed: int) -> Decoder:
    """Two layers, of which the first is dense."""
    first, second = (decoder(ffn, dim=DIM, layers=1).cfg.layers for ffn in (DENSE, SECOND[variant]))
    config = replace(decoder(DENSE, dim=DIM, layers=1).cfg, layers=(*first, *second))
    torch.manual_seed(seed)
    return config.build()


def train_variant(variant: str, steps: int, seed: int) -> Cell:
    model = build(variant, seed)
    learn(model, ByteText(16, LENGTH, seed), steps=steps, lr=LR, seed=seed)
    batch = held_out(512, LENGTH)
    cell = {"nats": loss(model.eval(), batch), "flops": forward_flops(model, LENGTH), "parameters": count(model)}
    return {**cell, **routing(model)}


@torch.no_grad()
def routing(model: Decoder) -> Cell:
    """Tokens of the busiest expert / mean and the share of dropped choices, as in training, on held-out text."""
    batch = held_out(512, LENGTH)
    ctx = model.train().context(batch.tokens, segments=batch.segments, positions=batch.positions)
    model.hidden(batch.tokens, ctx=ctx)
    metrics = ctx.reports.metrics
    if "router_load" not in metrics:
        return {"load": 1.0, "dropped": 0.0}
    (load, passes), (dropped, choices) = metrics["router_load"], metrics["router_dropped"]
    return {"load": float(load) / passes, "dropped": float(dropped) / choices}


def run(lab: Lab) -> Outcome:
    steps = 6000 if lab.full else 1200
    cells = lab.grid(train_variant, [{"variant": v, "steps": steps, "seed": s} for s in lab.seeds for v in SECOND])
    nats, load, dropped = ({v: column(cells, name, variant=v) for v in SECOND} for name in ("nats", "load", "dropped"))
    flops = {v: column(cells, "flops", variant=v)[0] for v in SECOND}
    findings = [
        exceeds(
            "with every other layer sparse, the loss is below that of a dense model of as many active FLOPs",
            "sec. 6.3", "nats per byte of the dense model and GLaM", nats["dense"], nats["GLaM"],
        ),
        exceeds(
            "the auxiliary loss evens the load of experts", "sec. 4", "busiest expert / mean without and with it",
            load["no auxiliary loss"], load["GLaM"],
        ),
        exceeds(
            "so that fewer choices exceed the capacity", "sec. 4", "share of dropped choices without and with it",
            dropped["no auxiliary loss"], dropped["GLaM"],
        ),
        stays_below(
            "no sparse model passes more FLOPs a token than the dense one", "ours", "times its FLOPs",
            [flops[v] / flops["dense"] for v in SECOND], 1.0, control=True,
        ),
        exceeds(
            "the experts that a token does not pass are what helps: with two experts in all, the loss is higher",
            "ours", "nats per byte of 2 and of 8 experts", nats["2 experts"], nats["GLaM"], control=True,
        ),
    ]  # fmt: skip
    table = [
        {
            "variant": v,
            "nats per byte": sum(nats[v]) / len(nats[v]),
            "busiest / mean": sum(load[v]) / len(load[v]),
            "dropped": sum(dropped[v]) / len(dropped[v]),
            "FLOPs a token": flops[v],
            "parameters": column(cells, "parameters", variant=v)[0],
        }
        for v in SECOND
    ]
    note = (
        f"{steps} updates of 1,024 bytes; all variants see the same batches at one rate, the dense model's best "
        "of three."
    )
    return Outcome(findings, table, note=note)


EXPERIMENT = Experiment("S7", "glam", "Every other layer sparse, at equal active FLOPs", run, minutes=5)

"""A million experts (PEER, He 2024): the best product keys are found exactly, and many tiny experts use FLOPs well."""

from __future__ import annotations

import math

import torch

from ...config import ModuleConfig
from ...models.inspect import count, forward_flops
from ...nn.feedforward import GLU
from ...nn.moe import MoE
from ...nn.peer import PEER
from ...nn.router import SoftmaxTopK
from ...ops.peer import product_topk
from ..experiment import Experiment, Outcome, equal, exceeds, reaches, stays_below
from ..lab import Cell, Lab, column
from ..learn import learn, loss
from ..small import decoder
from ..text import ByteText, held_out

DIM, LAYERS, LENGTH, LR = 64, 2, 64, 5e-3
KEYS, TOP = 64, 16  # sub-keys of a set, and how many pairs are wanted, in the search
VARIANTS: dict[str, ModuleConfig] = {
    "dense": GLU.Config(hidden=128),
    "coarse MoE": MoE.Config(experts=8, active=2, hidden=62, router=SoftmaxTopK.Config(balance=0.01)),
    "PEER": PEER.Config(experts=4096, heads=4, active=32, key_dim=16),
}


def search(seed: int) -> Cell:
    """The best of all pairs of random keys in float64: by product keys, by looking at all, and by the best few of each
    half alone."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(256, 32, dtype=torch.float64, generator=generator)
    keys = torch.randn(2, KEYS, 16, dtype=torch.float64, generator=generator)
    first, second = (q @ half.T for q, half in zip(queries.chunk(2, -1), keys, strict=True))
    every = (first[:, :, None] + second[:, None, :]).flatten(1)
    best = every.topk(TOP, -1)
    scores, at = product_topk(queries, keys, TOP)
    few = math.isqrt(TOP)
    a, b = first.topk(few, -1).indices, second.topk(few, -1).indices
    greedy = (a[:, :, None] * KEYS + b[:, None, :]).flatten(1)

    def missed(chosen: torch.Tensor) -> float:
        return (chosen.sort(-1).values != best.indices.sort(-1).values).any(-1).double().mean().item()

    error = ((scores - best.values).abs().max() / best.values.abs().max()).item()
    return {"error": error, "missed": missed(at), "greedy missed": missed(greedy)}


def train_variant(variant: str, steps: int, seed: int) -> Cell:
    """A small decoder over bytes with this feed-forward."""
    model = decoder(VARIANTS[variant], dim=DIM, layers=LAYERS, seed=seed)
    learn(model, ByteText(16, LENGTH, seed), steps=steps, lr=LR, seed=seed)
    nats = loss(model.eval(), held_out(512, LENGTH))
    return {"nats": nats, "flops": forward_flops(model, LENGTH), "parameters": count(model)}


def run(lab: Lab) -> Outcome:
    steps = 6000 if lab.full else 1200
    found = lab.grid(search, [{"seed": s} for s in lab.seeds])
    cells = lab.grid(train_variant, [{"variant": v, "steps": steps, "seed": s} for s in lab.seeds for v in VARIANTS])
    nats = {v: column(cells, "nats", variant=v) for v in VARIANTS}
    flops = {v: column(cells, "flops", variant=v)[0] for v in VARIANTS}
    findings = [
        equal(
            f"the best {TOP} of {KEYS}^2 product keys are those that looking at every key finds", "sec. 2.2",
            "scores, of 256 queries a seed", max(column(found, "error")), 1e-12,
        ),
        equal(
            "and they are the same experts", "sec. 2.2", "share of queries with another choice",
            max(column(found, "missed")), 0.0,
        ),
        reaches(
            "the best few of each half alone are not the best pairs", "ours", "share of queries where they differ",
            column(found, "greedy missed"), 0.5, control=True,
        ),
        *(
            exceeds(
                f"at no more active FLOPs, {better} has a lower held-out loss than {worse}", "figure 1, table 1",
                f"nats per byte of {worse} and {better}", nats[worse], nats[better],
            )
            for worse, better in (("dense", "coarse MoE"), ("coarse MoE", "PEER"), ("dense", "PEER"))
        ),
        stays_below(
            "the sparse models pass no more FLOPs a token than the dense one", "ours", "times its FLOPs",
            [flops[v] / flops["dense"] for v in ("coarse MoE", "PEER")], 1.0, control=True,
        ),
    ]  # fmt: skip
    table = [
        {
            "variant": v,
            "nats per byte": sum(nats[v]) / len(nats[v]),
            "FLOPs a token": flops[v],
            "parameters": column(cells, "parameters", variant=v)[0],
        }
        for v in VARIANTS
    ]
    note = (
        f"{steps} updates of 1,024 bytes; all variants see the same batches at one rate, the dense model's best "
        "of three."
    )
    return Outcome(findings, table, note=note)


EXPERIMENT = Experiment("A6", "peer", "Product keys find the best of many tiny experts", run, minutes=8)

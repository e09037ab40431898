"""Sparse mixture of experts (Shazeer et al. 2017) and Mixtral (2024): even loads, and more capacity at equal FLOPs."""

from __future__ import annotations

import torch

from ...config import ModuleConfig
from ...models.decoder import Decoder
from ...models.inspect import count, forward_flops
from ...nn.feedforward import GLU
from ...nn.moe import MoE
from ...nn.router import SoftmaxTopK
from ...nn.router_capacity import NoisyTopK
from ..experiment import Experiment, Outcome, exceeds, reaches, stays_below
from ..lab import Cell, Lab, column
from ..learn import learn, loss
from ..small import decoder
from ..text import ByteText, held_out

DIM, LAYERS, LENGTH, LR = 64, 2, 64, 5e-3
TOP2 = SoftmaxTopK.Config(balance=0.01)
VARIANTS: dict[str, ModuleConfig] = {
    "dense": GLU.Config(hidden=128),
    "Mixtral": MoE.Config(experts=8, active=2, hidden=62, router=TOP2),
    "2 experts": MoE.Config(experts=2, active=2, hidden=63, router=TOP2),
    "noisy": MoE.Config(experts=8, active=2, hidden=60, router=NoisyTopK.Config(importance=0.02, load=0.02)),
    "noisy, no losses": MoE.Config(experts=8, active=2, hidden=60, router=NoisyTopK.Config(importance=0.0, load=0.0)),
}


def train_variant(variant: str, steps: int, seed: int) -> Cell:
    """A small decoder over bytes with this feed-forward."""
    model = decoder(VARIANTS[variant], dim=DIM, layers=LAYERS, seed=seed)
    learn(model, ByteText(16, LENGTH, seed), steps=steps, lr=LR, seed=seed)
    nats = loss(model.eval(), held_out(512, LENGTH))
    figures = {"flops": forward_flops(model, LENGTH), "parameters": count(model)}
    return {"nats": nats, "load": busiest(model), **figures}


@torch.no_grad()
def busiest(model: Decoder) -> float:
    """Tokens of the busiest expert / mean, routed as in training, on held-out text; the mean over layers."""
    batch = held_out(512, LENGTH)
    ctx = model.train().context(batch.tokens, segments=batch.segments, positions=batch.positions)
    model.hidden(batch.tokens, ctx=ctx)
    total, passes = ctx.reports.metrics.get("router_load", (1.0, 1))
    return float(total) / passes


def run(lab: Lab) -> Outcome:
    steps = 6000 if lab.full else 1200
    cells = lab.grid(train_variant, [{"variant": v, "steps": steps, "seed": s} for s in lab.seeds for v in VARIANTS])
    nats, load = ({v: column(cells, name, variant=v) for v in VARIANTS} for name in ("nats", "load"))
    flops = {v: column(cells, "flops", variant=v)[0] for v in VARIANTS}
    findings = [
        exceeds(
            "losses on importance and load balance the experts", "1701.06538, sec. 4 and table 6",
            "busiest expert / mean without and with them", load["noisy, no losses"], load["noisy"],
        ),
        *(
            exceeds(
                f"at no more active FLOPs, {what} has a lower held-out loss than a dense model", source,
                f"nats per byte of dense and {name}", nats["dense"], nats[name],
            )
            for name, what, source in (
                ("noisy", "noisy top-2 of 8 experts", "1701.06538, sec. 5.1, figure 2"),
                ("Mixtral", "Mixtral's top-2 of 8 experts", "2401.04088, sec. 3"),
            )
        ),
        reaches(
            "without the losses, the load is uneven", "ours", "busiest expert / mean", load["noisy, no losses"], 1.5,
            control=True,
        ),
        stays_below(
            "no sparse model passes more FLOPs a token than the dense one", "ours", "times its FLOPs",
            [flops[v] / flops["dense"] for v in VARIANTS], 1.0, control=True,
        ),
        exceeds(
            "the experts that a token does not pass are what helps: with two experts in all, the loss is higher",
            "ours", "nats per byte of 2 and of 8 experts", nats["2 experts"], nats["Mixtral"], control=True,
        ),
    ]  # fmt: skip
    table = [
        {
            "variant": v,
            "nats per byte": sum(nats[v]) / len(nats[v]),
            "busiest / mean": sum(load[v]) / len(load[v]),
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


EXPERIMENT = Experiment("A8", "sparse-moe", "Balanced experts, and more of them at equal active FLOPs", run, minutes=5)

"""DeepSeekMoE (Dai et al. 2024): fine experts, a shared one; and DeepSeek-V3's balancing by biases, without a loss."""

from __future__ import annotations

import torch

from ...config import ModuleConfig
from ...models.decoder import Decoder
from ...models.inspect import count, forward_flops
from ...nn.feedforward import GLU
from ...nn.moe import MoE
from ...nn.router import SigmoidTopK, SoftmaxTopK
from ..experiment import Experiment, Outcome, exceeds, reaches, stays_below
from ..lab import Cell, Lab, column
from ..learn import learn, loss
from ..small import decoder
from ..text import ByteText, held_out

DIM, LAYERS, LENGTH, LR = 64, 2, 64, 5e-3
RATE = 1e-2  # of the bias; the paper's is a tenth, for a training of many thousands of updates
LOSS = SoftmaxTopK.Config(balance=0.01)


def fine(bias_rate: float) -> MoE.Config:
    router = SigmoidTopK.Config(bias_rate=bias_rate, balance=0.0)
    return MoE.Config(experts=31, active=7, hidden=17, router=router, shared=GLU.Config(hidden=17))


VARIANTS: dict[str, ModuleConfig] = {
    "coarse": MoE.Config(experts=8, active=2, hidden=72, router=LOSS),
    "fine, shared": MoE.Config(experts=31, active=7, hidden=17, router=LOSS, shared=GLU.Config(hidden=17)),
    "bias moves": fine(RATE),
    "bias stays": fine(0.0),
}


def train_variant(variant: str, steps: int, seed: int) -> Cell:
    """A small decoder over bytes with these experts."""
    model = decoder(VARIANTS[variant], dim=DIM, layers=LAYERS, seed=seed)
    learn(model, ByteText(16, LENGTH, seed), steps=steps, lr=LR, seed=seed)
    nats = loss(model.eval(), held_out(512, LENGTH))
    figures = {"flops": forward_flops(model, LENGTH), "parameters": count(model)}
    return {"nats": nats, "violation": violation(model), **figures}


@torch.no_grad()
def violation(model: Decoder) -> float:
    """Choices of the busiest expert / mean - 1 on held-out text (MaxVio, 2408.15664, eq. 4); the mean over layers."""
    batch = held_out(512, LENGTH)
    ctx = model.train().context(batch.tokens, segments=batch.segments, positions=batch.positions)
    model.hidden(batch.tokens, ctx=ctx)
    total, passes = ctx.reports.metrics["router_load"]
    return float(total) / passes - 1


def run(lab: Lab) -> Outcome:
    steps = 6000 if lab.full else 1200
    cells = lab.grid(train_variant, [{"variant": v, "steps": steps, "seed": s} for s in lab.seeds for v in VARIANTS])
    nats, uneven = ({v: column(cells, name, variant=v) for v in VARIANTS} for name in ("nats", "violation"))
    flops = {v: column(cells, "flops", variant=v)[0] for v in VARIANTS}
    findings = [
        exceeds(
            "a bias that moves after every update lowers the maximal load", "2412.19437, sec. 2.1.2; 2408.15664",
            "MaxVio of a bias that stays and one that moves", uneven["bias stays"], uneven["bias moves"],
        ),
        exceeds(
            "it balances without the harm of a loss: the held-out loss is lower than with an auxiliary loss",
            "2412.19437, table 5", "nats per byte with the loss and with the bias",
            nats["fine, shared"], nats["bias moves"],
        ),
        exceeds(
            "experts of a quarter of the size, four times as many, and one shared, are better than coarse ones",
            "2401.06066, sec. 4.4, figure 3", "nats per byte of coarse and of fine experts",
            nats["coarse"], nats["fine, shared"],
        ),
        reaches(
            "without balancing, the load is uneven", "ours", "MaxVio", uneven["bias stays"], 0.5, control=True,
        ),
        stays_below(
            "fine experts pass no more FLOPs a token than coarse ones", "ours", "times their FLOPs",
            [flops[v] / flops["coarse"] for v in VARIANTS], 1.0, control=True,
        ),
    ]  # fmt: skip
    table = [
        {
            "variant": v,
            "nats per byte": sum(nats[v]) / len(nats[v]),
            "MaxVio": sum(uneven[v]) / len(uneven[v]),
            "FLOPs a token": flops[v],
            "parameters": column(cells, "parameters", variant=v)[0],
        }
        for v in VARIANTS
    ]
    note = f"{steps} updates of 1,024 bytes; all variants see the same batches, at one learning rate."
    return Outcome(findings, table, note=note)


EXPERIMENT = Experiment("A9", "deepseek-moe", "Fine-grained experts, balanced by a bias", run, minutes=5)

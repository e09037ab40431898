"""Grouped-query attention (Ainslie et al. 2023): fewer key-value heads for a trained model, and 5% more training."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ...models.base import Model
from ...models.decoder import Decoder
from ...models.inspect import state_bytes
from ...nn.attention import Attention
from ...train.schedule import Constant, InverseSqrt
from ...transforms.uptrain import pool_heads
from ..experiment import Experiment, Outcome, equal, exceeds
from ..lab import Cell, Lab, column
from ..learn import learn, loss
from ..small import attention, decoder
from ..text import ByteText, held_out

DIM, LAYERS, HEADS, GROUPS, LENGTH = 128, 3, 8, 2, 128
SHARE = 0.05  # of the first training
LR, WARMUP = 4e-3, 50
VARIANTS = {
    "MHA": (HEADS, "mean"),
    "GQA": (GROUPS, "mean"),
    "MQA": (1, "mean"),
    "MQA, first head": (1, "first"),
    "MQA, new head": (1, "random"),
}


def converted(model: Decoder, kv_heads: int, way: str) -> Model:
    """The model with so many key-value heads: means of groups, or the first of each group, or new ones."""
    if kv_heads == HEADS:
        return copy.deepcopy(model)
    new, old = pool_heads(model, kv_heads), dict(model.named_modules())
    for name, module in new.named_modules():
        if way == "mean" or not isinstance(module, Attention):
            continue
        for part in ("k", "v"):
            weight = getattr(module, part).weight
            with torch.no_grad():
                if way == "first":
                    heads = getattr(old[name], part).weight.unflatten(0, (kv_heads, HEADS // kv_heads, -1))
                    weight.copy_(heads[:, 0].flatten(0, 1))
                else:
                    nn.init.normal_(weight, std=model.cfg.init.std or 0.0)
    return new


def uptrain(steps: int, seed: int) -> Cell:
    """Train with as many key-value heads as query heads, convert, and go on for a twentieth, at the last rate."""
    mixer = attention(DIM, head_dim=DIM // HEADS)
    model = decoder(mixers=[mixer] * LAYERS, dim=DIM, seed=seed)
    schedule = InverseSqrt(warmup=WARMUP)
    learn(model, ByteText(16, LENGTH, seed), steps=steps, lr=LR, seed=seed, schedule=schedule)
    more, last, text = round(SHARE * steps), LR * schedule.factor(steps, steps), held_out(192, LENGTH)
    found: Cell = {}
    for variant, (kv_heads, way) in VARIANTS.items():
        torch.manual_seed(seed)
        new = converted(model, kv_heads, way)
        assert isinstance(new, Decoder)
        found[f"{variant} before"] = loss(new, text)
        learn(new, ByteText(16, LENGTH, seed + 1000), steps=more, lr=last, seed=seed, schedule=Constant())
        found[variant] = loss(new, text)
        (found[f"{variant} bytes"],) = state_bytes(new, torch.bfloat16, 1024)
    return found


def run(lab: Lab) -> Outcome:
    steps = 4000 if lab.full else 800
    cells = lab.grid(uptrain, [{"steps": steps, "seed": s} for s in lab.seeds])
    nats = {name: column(cells, name) for v in VARIANTS for name in (v, f"{v} before")}
    size = {v: column(cells, f"{v} bytes")[0] for v in VARIANTS}
    ratio = size["MHA"] / size["GQA"] / (HEADS / GROUPS)
    findings = [
        exceeds(
            f"after {SHARE:.0%} more training, {better} is better than {worse}", "sec. 3.3, figure 4",
            f"nats per byte of MQA from {worse} and from {better}", nats[a], nats[b],
        )
        for a, worse, b, better in (
            ("MQA, first head", "the first head", "MQA", "the mean of the heads"),
            ("MQA, new head", "a new head", "MQA, first head", "the first head"),
        )
    ] + [
        exceeds(
            f"the quality of {GROUPS} groups lies below that of {HEADS} heads", "table 1",
            "nats per byte of GQA and MHA", nats["GQA"], nats["MHA"],
        ),
        exceeds(
            f"and above that of one head: {GROUPS} groups keep more than MQA", "table 1, figure 3",
            "nats per byte of MQA and GQA", nats["MQA"], nats["GQA"],
        ),
        exceeds(
            "GQA comes closer to MHA than to MQA", "sec. 3.2", "its distance, in nats per byte, to MQA and to MHA",
            [m - g for m, g in zip(nats["MQA"], nats["GQA"], strict=True)],
            [g - h for g, h in zip(nats["GQA"], nats["MHA"], strict=True)],
        ),
        equal(
            "its cache is smaller by the number of heads in a group", "sec. 2.2",
            f"{size['MHA']:,} and {size['GQA']:,} bytes at 1,024 tokens in bfloat16", abs(ratio - 1), 1e-12,
        ),
        exceeds(
            "it is the training that restores what pooling lost", "ours", "nats per byte of MQA before and after",
            nats["MQA before"], nats["MQA"], control=True,
        ),
    ]  # fmt: skip
    table = [
        {
            "variant": v,
            "nats before": sum(nats[f"{v} before"]) / len(cells),
            "nats after": sum(nats[v]) / len(cells),
            "cache bytes": size[v],
        }
        for v in VARIANTS
    ]
    return Outcome(
        findings,
        table,
        note=f"{steps} updates of 2,048 bytes with {HEADS} heads, then {round(SHARE * steps)} more at the last "
        "learning rate; MHA is trained as much longer as the others.",
    )


EXPERIMENT = Experiment("E7", "gqa", "Pooled key-value heads, and a little more training", run, minutes=3)

"""BERT (Devlin et al. 2018): a token in the middle is found better from both sides than from the left alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...data.masking import MaskedBatches, Masking
from ...models.decoder import Decoder
from ...models.encoder import Encoder, with_heads
from ...models.inspect import count
from ...objectives.mlm import MaskedLM
from ..experiment import Experiment, Outcome, exceeds
from ..lab import Cell, Lab, column
from ..learn import learn
from ..small import attention, decoder
from ..text import VOCAB, ByteText, held_out

DIM, LAYERS, LENGTH, MASK = 96, 3, 64, VOCAB
MIDDLE = range(LENGTH // 4, 3 * LENGTH // 4, 4)  # places that are filled, one at a time
MASKING = Masking(mask=MASK, vocab=VOCAB + 1)


def bert(causal: bool, masked: bool, seed: int) -> Decoder | Encoder:
    """A small model that looks both ways or to the left only, and is alike in everything else."""
    mixer = replace(attention(DIM), causal=causal)
    plain = decoder(mixers=[mixer] * LAYERS, dim=DIM, vocab=VOCAB + 1, tied=True, seed=seed)
    return with_heads(plain, {"mlm": plain.cfg.head}) if masked else plain


def fill(variant: str, steps: int, rows: int, seed: int) -> Cell:
    """Train, then fill the middle of held-out texts: nats and the share of right bytes."""
    causal, masked = variant != "both sides", variant != "left to right"
    model, text = bert(causal, masked, seed), ByteText(32, LENGTH, seed)
    if masked:
        learn(model, MaskedBatches(text, MASKING, seed=seed), steps=steps, lr=4e-3, seed=seed, objective=MaskedLM())
    else:
        learn(model, text, steps=steps, lr=4e-3, seed=seed)
    rows_of_text = held_out(rows, LENGTH)
    found = scores(model, masked, rows_of_text.tokens)
    if variant == "both sides":
        found |= {f"{name} astray": value for name, value in scores(model, masked, rows_of_text.tokens, True).items()}
    return {**found, "parameters": count(model)}


@torch.inference_mode()
def scores(model: Decoder | Encoder, masked: bool, tokens: Tensor, astray: bool = False) -> Cell:
    """At every place in MIDDLE: that token alone is hidden (or, left to right, what precedes it is all there is).
    `astray`: what follows it is another text's."""
    nats, right = 0.0, 0.0
    for place in MIDDLE:
        seen = tokens.clone()
        if astray:
            seen[:, place + 1 :] = tokens.roll(1, 0)[:, place + 1 :]
        if masked:
            seen[:, place] = MASK
        logits = model(seen)[:, place if masked else place - 1]
        nats -= logits.log_softmax(-1).gather(1, tokens[:, place, None]).mean().item()
        right += (logits.argmax(-1) == tokens[:, place]).double().mean().item()
    return {"nats": nats / len(MIDDLE), "accuracy": right / len(MIDDLE)}


def run(lab: Lab) -> Outcome:
    steps, rows = 6000 if lab.full else 1000, 8 if lab.quick else 256
    variants = ["both sides", "left to right", "masked, left only"]
    cells = lab.grid(
        fill, [{"variant": v, "steps": steps, "rows": rows, "seed": s} for s in lab.seeds for v in variants]
    )
    nats = {v: column(cells, "nats", variant=v) for v in variants}
    accuracy = {v: column(cells, "accuracy", variant=v) for v in variants}
    ours = [cell for cell in cells if cell["variant"] == "both sides"]
    astray = {name: column(ours, f"{name} astray") for name in ("nats", "accuracy")}
    findings = [
        exceeds(
            "both sides fill a middle token better than the left side does, read left to right", "sec. 3.1, C.1",
            "share of right bytes from both sides and left to right", accuracy["both sides"], accuracy["left to right"],
        ),
        exceeds(
            "and with a lower loss", "sec. 3.1", "nats per byte left to right and from both sides",
            nats["left to right"], nats["both sides"],
        ),
        exceeds(
            "it is the right side that helps: the same masked training with the left side only does worse",
            "sec. 5.1", "share of right bytes from both sides and from the left",
            accuracy["both sides"], accuracy["masked, left only"],
        ),
        exceeds(
            "with another text's right side the gain is gone", "ours",
            "share of right bytes left to right, and from both sides with the right one astray",
            accuracy["left to right"], astray["accuracy"], control=True,
        ),
    ]  # fmt: skip
    table = [
        {"variant": v, "right": sum(a) / len(a), "nats per byte": sum(n) / len(n)}
        for v, a, n in [
            *((v, accuracy[v], nats[v]) for v in variants),
            ("both sides, the right one astray", astray["accuracy"], astray["nats"]),
        ]
    ]
    note = (
        f"{steps} updates of 2,048 bytes; 15% hidden in masked training; {len(MIDDLE)} places of {rows} held-out rows."
    )
    return Outcome(findings, table, note=note)


EXPERIMENT = Experiment("F2", "bert", "Both sides fill a gap better than the left one", run, minutes=4)

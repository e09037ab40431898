"""Jamba (Lieber et al. 2024): among state space layers, one layer of attention is enough to recall."""

from __future__ import annotations

import torch

from ...data.synthetic import MQAR, Synthetic
from ...models.base import Init
from ...models.decoder import Decoder
from ...models.inspect import state_bytes
from ...models.pattern import pattern
from ..experiment import Experiment, Outcome, alike, exceeds, reaches
from ..lab import Cell, Lab, column
from ..learn import accuracy, learn

TASK = MQAR(pairs=4, length=16, symbols=16)
DIM, LR = 32, 5e-3
INIT = Init(std=None, embedding=1.0)  # by width, as widths of tens need
BLIND = "one layer that attends to its own token alone"
STACKS = {
    "Mamba": "3*mamba",
    "one layer of attention": "mamba + attention/none + mamba",
    "attention": "3*attention/none",
    BLIND: "mamba + window/none + mamba",
}
PARTS = {"mamba": {"state": 2}, "window": {"window": 1}}


def small(stack: str, seed: int = 0) -> Decoder:
    """Three layers of one width; the state of Mamba is a few numbers a channel, as the texts are of a few tokens."""
    text = STACKS[stack]
    parts = {name: fields for name, fields in PARTS.items() if name in text}
    torch.manual_seed(seed)
    return pattern(text, dim=DIM, vocab=TASK.vocab, parts=parts, tied=False, init=INIT).build()


def train_recall(stack: str, steps: int, seed: int) -> Cell:
    """It learns to recall; the share of values right in new texts."""
    model, data = small(stack, seed), Synthetic(TASK, 32, seed)
    learn(model, data, steps=steps, lr=LR, seed=seed)
    return {"right": accuracy(model.eval(), data.held_out(512))[0]}


def run(lab: Lab) -> Outcome:
    steps = 4000 if lab.full else 400
    cells = lab.grid(train_recall, [{"stack": k, "steps": steps, "seed": s} for s in lab.seeds for k in STACKS])
    right = {k: column(cells, "right", stack=k) for k in STACKS}
    what = "values right with one layer of attention and with "
    findings = [
        exceeds(
            "one layer of attention among Mamba layers recalls what Mamba alone does not", "sec. 6.2 and table 6",
            what + "Mamba alone", right["one layer of attention"], right["Mamba"],
        ),
        alike(
            "it recalls as well as attention alone", "sec. 6.1 and tables 4 and 5", what + "attention alone",
            right["one layer of attention"], right["attention"], 0.05,
        ),
        reaches(
            "the task can be learned: one of the stacks recalls", "ours", "values right, the best of the three,",
            max((right[k] for k in STACKS if k != BLIND), key=sum), 0.9, control=True,
        ),
        exceeds(
            "it is seeing other tokens that recalls, not the layer's weights", "ours",
            what + "a window of one token", right["one layer of attention"], right[BLIND], control=True,
        ),
    ]  # fmt: skip
    table = [
        {
            "stack": k,
            "values right": sum(right[k]) / len(right[k]),
            "worst": min(right[k]),
            "bytes of state at 4,096 tokens": state_bytes(small(k), torch.float32, 4096)[0],
        }
        for k in STACKS
    ]
    note = (
        f"{TASK.pairs} pairs in {TASK.length} tokens, width {DIM}, three layers without feed-forwards; {steps} updates "
        f"of 32 texts at {LR}, for all stacks. Jamba's own layers are 1 : 7, and its evidence is in-context learning."
    )
    return Outcome(findings, table, note=note)


EXPERIMENT = Experiment("A10", "jamba", "One layer of attention among Mamba layers restores recall", run, 1)

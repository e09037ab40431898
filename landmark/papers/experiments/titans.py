"""Titans (Behrouz et al. 2025): with a neural memory beside it, a short window answers for what it no longer sees. The
paper's results are contested, so only the direction is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from ...data.batches import Batch
from ...data.synthetic import InductionHeads, Synthetic
from ...models.base import Init
from ...models.decoder import Decoder
from ...models.pattern import Parts, pattern
from ...nn.neural_memory import NeuralMemory
from ...nn.persistent import PersistentAttention
from ...nn.rope import Rope
from ..experiment import Experiment, Outcome, exceeds, reaches, stays_below
from ..lab import Cell, Lab, column
from ..learn import learn

TASK = InductionHeads(length=48, symbols=7)
DIM, LR, WINDOW, LAYERS = 32, 5e-3, 8, 2
INIT = Init(std=None, embedding=1.0)  # by width, as widths of tens need
REACH = LAYERS * (WINDOW - 1)  # of windows on top of each other
ATTENTION = PersistentAttention.Config(heads=4, kv_heads=4, head_dim=8, rope=Rope.Config(), window=WINDOW, tokens=4)
MEMORY = NeuralMemory.Config(heads=2, depth=1, chunk=16)
STACKS: dict[str, tuple[str, Parts]] = {
    "window": (f"{LAYERS}*window/none", {"window": ATTENTION}),
    "Titans (MAG)": (
        f"{LAYERS}*titans-mag/none",
        {"titans-mag": {"attention": ATTENTION, "memory": MEMORY}},
    ),
}


def small(stack: str, seed: int) -> Decoder:
    text, parts = STACKS[stack]
    torch.manual_seed(seed)
    return pattern(text, dim=DIM, vocab=TASK.vocab, parts=parts, tied=False, init=INIT).build()


@torch.inference_mode()
def answers(model: Decoder, batch: Batch) -> tuple[float, float]:
    """The share of answers that are right: where the needle is beyond the windows' reach, and where it is within."""
    right = model.eval()(batch.tokens)[:, -1].argmax(-1) == batch.targets[:, -1]
    needle = (batch.tokens == TASK.symbols).int().argmax(1)
    far: Tensor = TASK.length - 2 - needle > REACH
    return right[far].double().mean().item(), right[~far].double().mean().item()


def train_needle(stack: str, steps: int, seed: int) -> Cell:
    """It learns to say which symbol followed a sign that occurred once."""
    model, data = small(stack, seed), Synthetic(TASK, 32, seed)
    learn(model, data, steps=steps, lr=LR, seed=seed)
    far, near = answers(model, data.held_out(1024))
    return {"beyond": far, "within": near}


def run(lab: Lab) -> Outcome:
    steps = 4000 if lab.full else 400
    cells = lab.grid(train_needle, [{"stack": k, "steps": steps, "seed": s} for s in lab.seeds for k in STACKS])
    beyond, within = ({k: column(cells, name, stack=k) for k in STACKS} for name in ("beyond", "within"))
    titans, guess = "Titans (MAG)", 1 / TASK.symbols
    findings = [
        exceeds(
            "a memory beside windowed attention recalls needles beyond the windows (direction only)",
            "sec. 5.3, table 2", "answers right with memory and without", beyond[titans], beyond["window"],
        ),
        stays_below(
            f"beyond the windows, attention alone guesses (1 in {TASK.symbols})", "ours", "answers right",
            beyond["window"], 1.5 * guess, control=True,
        ),
        reaches(
            "within the windows it does not: the task is learned", "ours", "answers right", within["window"],
            2 * guess, control=True,
        ),
    ]  # fmt: skip
    table = [
        {"model": k, "right beyond": sum(beyond[k]) / len(cells) * 2, "right within": sum(within[k]) / len(cells) * 2}
        for k in STACKS
    ]
    note = (
        f"{LAYERS} layers of width {DIM} with windows of {WINDOW}, texts of {TASK.length} tokens; {steps} updates of "
        f"32 at {LR}, for both. The memory is one matrix a head; the paper's lengths and its other variants are not "
        "tried here."
    )
    return Outcome(findings, table, note=note)


EXPERIMENT = Experiment("A5", "titans", "A neural memory recalls needles beyond the attention window", run, 1.5)

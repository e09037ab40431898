"""Transformers are SSMs (Dao and Gu 2024): the recurrence of Mamba-2 is masked attention is a chunked algorithm, and
what it affords, a larger state, recalls more."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ctx import Bounds
from ...data.synthetic import MQAR, Synthetic
from ...models.base import Init
from ...models.decoder import Decoder
from ...models.pattern import pattern
from ...ops.ssd import Backend, ssd
from ..experiment import Curve, Experiment, Outcome, Plot, equal, exceeds, reaches, stays_below
from ..lab import Cell, Lab, column
from ..learn import accuracy, learn

LENGTH, CHUNKS = 75, (1, 16, 64)
TASK = MQAR(pairs=16, length=64, symbols=64)
DIM, LR, STATES = 32, 5e-3, (2, 4, 16)
INIT = Init(std=None, embedding=1.0)  # by width, as widths of tens need


def compare(seed: int) -> Cell:
    """A random model of 4 heads in 2 groups on random texts in float64, in every form: outputs and gradients beside
    those of the recurrence."""
    torch.manual_seed(seed)
    rows = 2, LENGTH
    x, B, C = torch.randn(*rows, 4, 8), torch.randn(*rows, 2, 16), torch.randn(*rows, 2, 16)
    drawn = x, F.softplus(torch.randn(*rows, 4)), -torch.rand(4), B, C
    inputs = x, dt, A, B, C = tuple(t.double().requires_grad_() for t in drawn)
    weight, D, whole = torch.randn(*rows, 4, 8).double(), torch.randn(4).double(), Bounds(*rows)

    def form(backend: Backend, chunk: int = 64, bounds: Bounds = whole) -> list[Tensor]:
        y, _ = ssd(x, dt, A, B, C, D, bounds, chunk=chunk, backend=backend)
        return [y, *torch.autograd.grad((y * weight).sum(), inputs)]

    truth = form("reference")
    cut = Bounds(*rows, tuple((r * LENGTH + at, min(16, LENGTH - at)) for r in (0, 1) for at in range(0, LENGTH, 16)))
    return {
        "masked attention": apart(form("quadratic"), truth),
        **{f"chunks of {n}": apart(form("chunked", n), truth) for n in CHUNKS},
        "without state between chunks": apart(form("chunked", 16, cut), truth),
    }


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def small(state: int, seed: int) -> Decoder:
    torch.manual_seed(seed)
    mixer = {"heads": 2 * DIM // 16, "head_dim": 16, "state": state}
    return pattern("2*mamba2", dim=DIM, vocab=TASK.vocab, parts={"mamba2": mixer}, tied=False, init=INIT).build()


def train_recall(state: int, steps: int, seed: int) -> Cell:
    """Two layers with states of this width learn to recall; the share of values right in new texts."""
    model, data = small(state, seed), Synthetic(TASK, 32, seed)
    learn(model, data, steps=steps, lr=LR, seed=seed)
    return {"right": accuracy(model.eval(), data.held_out(512))[0]}


def run(lab: Lab) -> Outcome:
    steps = 4000 if lab.full else 1200
    same = lab.grid(compare, [{"seed": s} for s in lab.seeds])
    cells = lab.grid(train_recall, [{"state": n, "steps": steps, "seed": s} for s in lab.seeds for n in STATES])
    right = {n: column(cells, "right", state=n) for n in STATES}
    forms = ["masked attention", *(f"chunks of {n}" for n in CHUNKS)]
    few, some, many = STATES
    findings = [
        *(
            equal(
                f"the recurrence is {'masked attention' if name == forms[0] else 'the SSD algorithm with ' + name}",
                "theorem 3.7 and sec. 6", f"outputs and gradients on {len(same)} random models in float64",
                max(column(same, name)), 1e-11,
            )
            for name in forms
        ),
        *(
            exceeds(
                f"a state of {more} recalls more than one of {less}", "sec. 9.1, figure 8",
                "values right", right[more], right[less],
            )
            for more, less in ((some, few), (many, some))
        ),
        reaches(
            "without the state that passes from chunk to chunk it is another model", "ours", "relative change",
            column(same, "without state between chunks"), 1e-2, control=True,
        ),
        stays_below(
            f"a state of {few} is too small for {TASK.pairs} pairs: the task asks for states", "ours", "values right",
            right[few], 0.9, control=True,
        ),
    ]  # fmt: skip
    table = [{"state": n, "values right": sum(right[n]) / len(right[n]), "worst": min(right[n])} for n in STATES]
    plot = Plot(
        f"Recall of {TASK.pairs} pairs", "state", "values right",
        [Curve("Mamba-2", STATES, list(zip(*right.values(), strict=True)))], log_x=True,
    )  # fmt: skip
    note = f"Two layers of width {DIM}; {steps} updates of 32 texts of {TASK.length} tokens at {LR}, for all states."
    return Outcome(findings, table, plot, note)


EXPERIMENT = Experiment("A3", "mamba2", "State spaces are masked attention, and larger states recall more", run, 5)

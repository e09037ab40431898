"""Mamba (Gu and Dao 2023): a state space model whose step and matrices depend on the token selects what it keeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...config import ModuleConfig
from ...data.synthetic import InductionHeads, SelectiveCopying, Synthetic, Task
from ...models.base import Init
from ...models.decoder import Decoder
from ...models.pattern import pattern
from ...nn.mamba import Mamba
from ..experiment import Curve, Experiment, Outcome, Plot, exceeds, reaches
from ..lab import Cell, Lab, column
from ..learn import accuracy, learn

DIM, LR = 32, 5e-3
INIT = Init(std=None, embedding=1.0)  # by width, as widths of tens need
TASKS: dict[str, Task] = {
    "selective copying": SelectiveCopying(length=32, count=4, symbols=6),
    "copying": SelectiveCopying(length=32, count=4, symbols=6, spaced=True),
    "induction": InductionHeads(length=32, symbols=7),
}
LONGER = (32, 64, 128, 256, 512)
FAR = 128


class Constant(nn.Module):
    """The same numbers [channels] for every token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(channels))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.value)

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(*x.shape[:-1], -1)


class TimeInvariant(Mamba):
    """Mamba whose step, B and C are learned, but the same for every token: what S4 is in Mamba's block."""

    class Config(Mamba.Config):
        def build(self, dim: int) -> TimeInvariant:
            return TimeInvariant(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__(cfg, dim)
        self.select = Constant(sum(self.parts))  # type: ignore[assignment]


MIXERS: dict[str, ModuleConfig] = {"selective": Mamba.Config(), "time-invariant": TimeInvariant.Config()}


def small(mixer: str, task: Task, seed: int) -> Decoder:
    torch.manual_seed(seed)
    parts = {"mixer": MIXERS[mixer]}
    return pattern("2*mixer", dim=DIM, vocab=task.vocab, parts=parts, tied=False, init=INIT).build()


def train_task(mixer: str, task: str, steps: int, seed: int) -> Cell:
    """Two layers of it learn a task; the share of symbols that it says right in new texts, also in longer ones."""
    model = small(mixer, TASKS[task], seed)
    data = Synthetic(TASKS[task], 32, seed)
    learn(model, data, steps=steps, lr=LR, seed=seed)
    found: Cell = {"accuracy": accuracy(model.eval(), data.held_out(1024))[0]}
    if task == "induction":
        found["longer"] = [
            accuracy(model, InductionHeads(length=n, symbols=7).batch(256, -1 - seed))[0] for n in LONGER
        ]
    return found


def run(lab: Lab) -> Outcome:
    steps = 6000 if lab.full else 2000
    cases = [{"mixer": m, "task": t, "steps": steps, "seed": s} for s in lab.seeds for t in TASKS for m in MIXERS]
    cells = lab.grid(train_task, cases)
    right = {(m, t): column(cells, "accuracy", mixer=m, task=t) for m in MIXERS for t in TASKS}
    longer = {m: column(cells, "longer", mixer=m, task="induction") for m in MIXERS}
    after = {(m, n): [v[LONGER.index(n)] for v in values] for m, values in longer.items() for n in LONGER}  # type: ignore[index]
    findings = [
        reaches(
            "Mamba solves selective copying (99.8%)", "table 1", "share of symbols right",
            right["selective", "selective copying"], 0.95,
        ),
        exceeds(
            "the same block with a time-invariant state space model does not (56.4%)", "table 1",
            "share of symbols right, selective and time-invariant,", right["selective", "selective copying"],
            right["time-invariant", "selective copying"], by=0.2,
        ),
        reaches("Mamba learns induction heads", "table 2", "answers right", right["selective", "induction"], 0.95),
        reaches(
            f"and extrapolates: trained on {LONGER[0]} tokens, it answers after {FAR}", "table 2", "answers right",
            after["selective", FAR], 0.95,
        ),
        reaches(f"and after {LONGER[-1]}", "table 2", "answers right", after["selective", LONGER[-1]], 0.95),
        exceeds(
            "which what does not select cannot", "table 2", f"answers right after {FAR}, selective and time-invariant,",
            after["selective", FAR], after["time-invariant", FAR], by=0.2,
        ),
        reaches(
            "copying from places that do not vary, the time-invariant model can learn", "sec. 3.1, figure 2",
            "share of symbols right", right["time-invariant", "copying"], 0.95, control=True,
        ),
        reaches(
            "it is not for want of training: at the trained length the time-invariant model answers too", "ours",
            "answers right", right["time-invariant", "induction"], 0.95, control=True,
        ),
    ]  # fmt: skip
    table = [
        {"model": m, "task": t, "right": sum(values) / len(values), "worst": min(values)}
        for (m, t), values in right.items()
    ]
    curves = [Curve(m, LONGER, values) for m, values in longer.items()]  # type: ignore[arg-type]
    plot = Plot("Induction heads, trained on 32 tokens", "tokens", "answers right", curves, log_x=True)
    note = f"Two layers of width {DIM}; {steps} updates of 32 texts at {LR}, for both models and all tasks."
    return Outcome(findings, table, plot, note)


EXPERIMENT = Experiment("A2", "mamba", "A state space model that selects copies what matters and recalls it", run, 5)

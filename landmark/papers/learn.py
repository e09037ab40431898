"""Small trainings for experiments, by the same loop as any other training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..data.batches import IGNORE, Batch
from ..models.base import Model
from ..models.decoder import Decoder
from ..objectives.base import Objective
from ..objectives.lm import CausalLM
from ..train.config import Checkpoints, Evaluation, Settings
from ..train.loop import Batches, Callback, Run, fit
from ..train.optim import AdamW, OptimizerConfig
from ..train.schedule import Cosine, Schedule

MOST: ContextVar[int | None] = ContextVar("most updates", default=None)


@contextmanager
def only(steps: int) -> Iterator[None]:
    """Within, `learn` makes at most so many updates: to see that an experiment runs."""
    before = MOST.set(steps)
    try:
        yield
    finally:
        MOST.reset(before)


class Average(Callback):
    """The mean of the weights after each update from number `first` on, which `put` makes the model's."""

    def __init__(self, first: int) -> None:
        self.first, self.seen = first, 0
        self.mean: list[Tensor] = []

    @torch.no_grad()
    def update(self, run: Run, record: dict[str, Any]) -> None:
        if run.step < self.first:
            return
        self.seen += 1
        now = [p.detach() for p in run.model.parameters()]
        if not self.mean:
            self.mean = [p.clone() for p in now]
        torch._foreach_lerp_(self.mean, now, 1 / self.seen)

    @torch.no_grad()
    def put(self, model: Model) -> None:
        for p, mean in zip(model.parameters(), self.mean, strict=True):
            p.copy_(mean)


def learn(
    model: Model, batches: Batches, *, steps: int, lr: float = 1e-3, seed: int = 0, objective: Objective = CausalLM(),
    optimizer: OptimizerConfig | None = None, schedule: Schedule | None = None, average: float = 0.0, **settings: Any,
) -> Model:  # fmt: skip
    """Train `model` in place, `steps` updates; default: AdamW at `lr`, cosine after a tenth of warm-up, next tokens.

    With `average`, its weights are in the end their mean over this last share of the updates.
    """
    most = MOST.get()
    if most is not None and most < steps:
        steps, schedule = most, None
    chosen = Settings(
        steps=steps,
        optimizer=optimizer or AdamW.Config(lr=lr),
        schedule=schedule or Cosine(warmup=max(1, steps // 10)),
        seed=seed,
        evaluation=Evaluation(every=None),
        checkpoints=Checkpoints(every=None, keep=1),
        peak_flops=1.0,  # nobody asks for the utilisation
        **settings,
    )
    mean = Average(steps + 1 - max(1, round(average * steps)))
    with tempfile.TemporaryDirectory() as out:
        fit(model, objective, batches, chosen, out=out, callbacks=[mean] if average else [])
    if average:
        mean.put(model)
    return model


@torch.inference_mode()
def accuracy(model: Decoder, batch: Batch) -> tuple[float, float]:
    """The share of targets, and of rows with all their targets, where the likeliest next token is right."""
    logits = model(batch.tokens, segments=batch.segments, positions=batch.positions)
    counts = batch.targets != IGNORE
    right = (logits.argmax(-1) == batch.targets) | ~counts
    return (right & counts).sum().item() / counts.sum().item(), right.all(1).double().mean().item()


@torch.inference_mode()
def loss(model: Model, batch: Any, objective: Objective = CausalLM()) -> float:
    """The objective's mean on one batch, in nats."""
    return float(objective.loss(model, batch).value)

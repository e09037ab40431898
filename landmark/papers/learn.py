"""Small trainings for experiments, by the same loop as any other training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from ..data.batches import IGNORE, Batch
from ..models.base import Model
from ..models.decoder import Decoder
from ..objectives.base import Objective
from ..objectives.lm import CausalLM
from ..train.config import Checkpoints, Evaluation, Settings
from ..train.loop import Batches, fit
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


def learn(
    model: Model, batches: Batches, *, steps: int, lr: float = 1e-3, seed: int = 0, objective: Objective = CausalLM(),
    optimizer: OptimizerConfig | None = None, schedule: Schedule | None = None, **settings: Any,
) -> Model:  # fmt: skip
    """Train `model` in place, `steps` updates; default: AdamW at `lr`, cosine after a tenth of warm-up, next tokens."""
    steps = min(steps, MOST.get() or steps)
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
    with tempfile.TemporaryDirectory() as out:
        fit(model, objective, batches, chosen, out=out)
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

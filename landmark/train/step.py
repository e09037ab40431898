"""The training step as a module, so that what wraps modules (DDP, FSDP) sees its forward; and its results, added up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ..objectives.base import Loss, Objective
from ..parallel.world import World

Outcome = tuple[Tensor, int, dict[str, tuple[Tensor, int]]]


class Step(nn.Module):
    """batch -> (sum, count, metrics) of the objective's loss: a plain tuple, whose tensors hooks can find."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Any) -> Outcome:
        loss = self.objective.loss(self.model, batch)
        return loss.sum, loss.count, loss.metrics


class Totals:
    """Sums and counts of losses and metrics over micro-batches, then over processes."""

    def __init__(self) -> None:
        self.pairs: dict[str, list[Any]] = {}

    def add(self, loss: Loss) -> None:
        for name, (total, count) in {"loss": (loss.sum.detach(), loss.count), **loss.metrics}.items():
            pair = self.pairs.setdefault(name, [0.0, 0])
            pair[0] = pair[0] + total.to(torch.float64)
            pair[1] += count

    def means(self, world: World) -> dict[str, float]:
        """Metric -> mean over everything that was added anywhere; a metric that nothing counted for is left out.

        One wait for the device, and one exchange, in which processes need not have the same metrics.
        """
        names = list(self.pairs)
        sums = torch.stack([self.pairs[name][0] for name in names]).tolist()
        mine = {name: (total, self.pairs[name][1]) for name, total in zip(names, sums, strict=True)}
        both: dict[str, tuple[float, int]] = {}
        for pairs in world.gather(mine):
            for name, (total, count) in pairs.items():
                before = both.get(name, (0.0, 0))
                both[name] = before[0] + total, before[1] + count
        return {name: total / max(count, 1) for name, (total, count) in both.items() if count or name == "loss"}


@torch.no_grad()
def evaluate(step: nn.Module, batches: Iterable[Any], world: World) -> dict[str, float]:
    """Means of the objective's loss and metrics over held-out batches, shared out among the processes.

    All processes make equally many calls, as sharded models need; what is repeated for that is not counted.
    """
    held: Sequence[Any] = list(batches)
    if not held:
        raise ValueError("there is no held-out batch to evaluate on")
    totals = Totals()
    step.eval()
    try:
        for first in range(0, len(held), world.size):
            index = first + world.rank
            loss = Loss(*step(held[min(index, len(held) - 1)].to(world.device)))
            if index >= len(held):
                loss = Loss(loss.sum * 0, 0, {name: (total * 0, 0) for name, (total, _) in loss.metrics.items()})
            totals.add(loss)
    finally:
        step.train()
    return totals.means(world)


def extent(batch: Any) -> tuple[int, int]:
    """How many tokens a batch makes a model read, and how many of them lie in a row: of `tokens`, or of a pair."""
    read = [getattr(batch, f.name) for f in fields(batch) if f.name in ("tokens", "source", "target_in")]
    return sum(ids.numel() for ids in read), max(ids.shape[-1] for ids in read)

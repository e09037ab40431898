"""What training minimises: an objective maps a model and a batch to a loss that knows what it is an average of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ..ctx import Reports


@dataclass(frozen=True)
class Loss:
    """`sum` / `count` is the loss; sums and counts add up over micro-batches and ranks, so splitting a batch changes
    nothing. `metrics` are detached (sum, count) pairs that add up in the same way."""

    sum: Tensor
    count: int
    metrics: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    @property
    def value(self) -> Tensor:
        return self.sum / max(self.count, 1)


def with_reports(loss: Loss, reports: Reports) -> Loss:
    """`loss` with what the model's layers reported: their losses count once for each of its `count`."""
    total = loss.sum
    for value in reports.losses:
        total = total + value * loss.count
    return Loss(total, loss.count, {**loss.metrics, **reports.metrics})


class Objective(Protocol):
    """A loss function with its settings. Objectives are stateless: what they need to know of a model is the model."""

    def count(self, batch: Any) -> int:
        """What `loss(model, batch).count` will be, without running the model."""

    def loss(self, model: Any, batch: Any) -> Loss:
        """The loss of one (micro-)batch."""

"""Multi-token prediction: the next token, and by further modules those after it (Gloeckle et al. 2024; DeepSeek-V3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ctx import Bounds
from ..data.batches import IGNORE, Batch
from ..models.decoder import Decoder
from .base import Loss, with_reports


@dataclass(frozen=True)
class MultiToken:
    """nll + `weight` / depth * sum of the nll of each of the model's drafts (DeepSeek-V3, eq. 24 and 25), in nats per
    next token. Targets of drafts are of the same document.

    Metrics: `nll`, `bits_per_byte` of the next token; `draft_1`, ...: nll of the token so many places after it.
    """

    weight: float = 0.3
    z_loss: float = 0.0

    def count(self, batch: Batch) -> int:
        return int((batch.targets >= 0).sum())

    def loss(self, model: Decoder, batch: Batch) -> Loss:
        if model.drafts is None:
            raise ValueError("this model foretells the next token only; give its config drafts")
        ctx = model.context(batch.tokens, segments=batch.segments, positions=batch.positions)
        hidden, drafted = model.hidden_and_drafts(batch.tokens, ctx)
        out = model.loss(hidden, batch.targets, z_loss=self.z_loss)
        count, total = self.count(batch), out.loss
        metrics = {"nll": (out.nll, count)}
        if batch.n_bytes:
            metrics["bits_per_byte"] = (out.nll / math.log(2), batch.n_bytes)
        for k, made in enumerate(drafted, 1):
            targets = targets_ahead(batch.targets, ctx.bounds, k)
            ahead = model.loss(made, targets)
            total = total + ahead.loss * (self.weight / len(drafted))
            metrics[f"draft_{k}"] = (ahead.nll, int((targets >= 0).sum()))
        return with_reports(Loss(total, count, metrics), ctx.reports)


def targets_ahead(targets: Tensor, bounds: Bounds, places: int) -> Tensor:
    """The targets [B, T] of tokens so many places on, IGNORE where those belong to another sequence."""
    index = bounds.index(targets.device)
    ahead = torch.full_like(targets, IGNORE)
    same = (index[:, places:] == index[:, : index.shape[1] - places]) & (index[:, places:] >= 0)
    ahead[:, : targets.shape[1] - places] = targets[:, places:].masked_fill(~same, IGNORE)
    return ahead

"""Causal language modelling: predict the next token of every document (Radford et al. 2018, eq. 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..data.batches import Batch
from ..models.decoder import Decoder
from .base import Loss, with_reports


@dataclass(frozen=True)
class CausalLM:
    """-log p(target), in nats per token; `z_loss` weighs log(Z)^2 (Chowdhery et al. 2022, sec. 5).

    Metrics: `nll`, without smoothing and z; `bits_per_byte`, where the batch knows how many bytes its targets cover.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def count(self, batch: Batch) -> int:
        return int((batch.targets >= 0).sum())

    def loss(self, model: Decoder, batch: Batch) -> Loss:
        ctx = model.context(batch.tokens, segments=batch.segments, positions=batch.positions)
        hidden = model.hidden(batch.tokens, ctx=ctx)
        out = model.loss(hidden, batch.targets, z_loss=self.z_loss, label_smoothing=self.label_smoothing)
        count = self.count(batch)
        metrics = {"nll": (out.nll, count)}
        if batch.n_bytes:
            metrics["bits_per_byte"] = (out.nll / math.log(2), batch.n_bytes)
        return with_reports(Loss(out.loss, count, metrics), ctx.reports)

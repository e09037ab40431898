"""Sequence to sequence: every token of the target from the source and what precedes it (Vaswani et al. 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..data.pairs import Seq2SeqBatch
from ..models.encoder_decoder import EncoderDecoder
from .base import Loss


@dataclass(frozen=True)
class Seq2Seq:
    """-sum_v q(v) log p(v), in nats per token, where q gives 1 - `label_smoothing` to the target and spreads the rest
    over the vocabulary (Szegedy et al. 2015, sec. 7; 0.1 in Vaswani et al. 2017, sec. 5.4).

    Metrics: `nll`, without smoothing; `bits_per_byte`, where the batch knows how many bytes its targets are.
    """

    label_smoothing: float = 0.1

    def count(self, batch: Seq2SeqBatch) -> int:
        return int((batch.target_out >= 0).sum())

    def loss(self, model: EncoderDecoder, batch: Seq2SeqBatch) -> Loss:
        hidden = model.hidden(
            batch.source, batch.target_in, source_segments=batch.source_segments, target_segments=batch.target_segments
        )
        out = model.loss(hidden, batch.target_out, label_smoothing=self.label_smoothing)
        count = self.count(batch)
        metrics = {"nll": (out.nll, count)}
        if batch.n_bytes:
            metrics["bits_per_byte"] = (out.nll / math.log(2), batch.n_bytes)
        return Loss(out.loss, count, metrics)

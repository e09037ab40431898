"""Masked language modelling, with or without what pairs of sentences teach (Devlin et al. 2018; Lan et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ctx import Bounds
from ..data.batches import IGNORE, Batch
from ..data.labelled import LabelledBatch
from ..models.encoder import Encoder
from ..nn.embedding import Head
from .base import Loss, with_reports
from .classification import wide


@dataclass(frozen=True)
class MaskedLM:
    """-log p(hidden token), in nats a hidden token; of the others no logits are ever computed.

    Where the batch has labels of sentence pairs (next sentence or sentence order), each pair's -log p(label) is added,
    as often as the pair has hidden tokens. So for pairs with equally many the loss is the sum of the two means, as in
    BERT, and splitting a batch changes nothing. Metrics: `mlm`, and in eval mode the `accuracy` of the hidden tokens;
    `pair`, `pair_accuracy`.
    """

    head: str = "mlm"
    pair_head: str = "pair"

    def count(self, batch: Batch) -> int:
        return int((batch.targets != IGNORE).sum())

    def loss(self, model: Encoder, batch: Batch) -> Loss:
        ctx = model.context(batch.tokens, segments=batch.segments, positions=batch.positions)
        hidden = model.hidden(batch.tokens, types=batch.types, ctx=ctx)
        head, hides = model.head(self.head), batch.targets != IGNORE
        assert isinstance(head, Head), "a masked-LM objective needs a head over the vocabulary"
        out = head.loss(hidden[hides], batch.targets[hides], model.embed)
        count = self.count(batch)
        total, metrics = out.loss, {"mlm": (out.nll, count)}
        if not model.training:
            found = head(hidden[hides], model.embed).argmax(-1)
            metrics["accuracy"] = ((found == batch.targets[hides]).sum(), count)
        labels = batch.labels if isinstance(batch, LabelledBatch) else None
        if labels is not None:
            logits = wide(model.read(self.pair_head, hidden, ctx.bounds))
            nll = F.cross_entropy(logits, labels, reduction="none")
            total = total + (nll * hidden_per_sequence(hides, ctx.bounds)).sum()
            right = (logits.detach().argmax(-1) == labels).sum()
            metrics |= {"pair": (nll.detach().sum(), len(labels)), "pair_accuracy": (right, len(labels))}
        return with_reports(Loss(total, count, metrics), ctx.reports)


def hidden_per_sequence(hides: Tensor, bounds: Bounds) -> Tensor:
    """How many tokens of each sequence hides [B, T] marks, [sequences]."""
    counts = torch.zeros(len(bounds.sequences) + 1, dtype=torch.long, device=hides.device)
    return counts.index_add_(0, bounds.index(hides.device).flatten() + 1, hides.flatten().long())[1:]

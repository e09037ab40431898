"""Fine-tuning on labels: of sequences, tokens and spans, and of GPT-1's texts, with its auxiliary language model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ctx import Bounds
from ..data.batches import IGNORE, Batch
from ..data.labelled import LabelledBatch
from ..models.encoder import Encoder
from ..nn.embedding import Head
from .base import Loss

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class SequenceClassification:
    """The loss of whole sequences' labels: cross-entropy of a class [B] (IGNORE: unknown), binary cross-entropy of each
    label's truth [B, labels], or squared error of values [B, labels]; a mean over classes, truths or values.

    `problem` has the names that config.json gives it. Metric: `accuracy` (not of values).
    """

    problem: ProblemType = "single_label_classification"
    head: str = "classify"

    def count(self, batch: LabelledBatch) -> int:
        labels = known(batch)
        return int((labels != IGNORE).sum()) if self.problem == "single_label_classification" else labels.numel()

    def loss(self, model: Encoder, batch: LabelledBatch) -> Loss:
        logits, labels, count = wide(model(**inputs(batch), head=self.head)), known(batch), self.count(batch)
        if self.problem == "single_label_classification":
            right = (logits.detach().argmax(-1) == labels).sum()
            return Loss(F.cross_entropy(logits, labels, reduction="sum"), count, {"accuracy": (right, count)})
        truth = labels.to(logits.dtype).view_as(logits)
        if self.problem == "regression":
            return Loss(F.mse_loss(logits, truth, reduction="sum"), count)
        right = ((logits.detach() > 0) == (truth > 0.5)).sum()
        total = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
        return Loss(total, count, {"accuracy": (right, count)})


@dataclass(frozen=True)
class MultipleChoice:
    """Cross-entropy of the right one of `choices` sequences that follow each other in the batch, by a score for each
    (Radford et al. 2018, sec. 3.3). Labels [B], alike for all choices of a question. Metric: `accuracy`."""

    choices: int
    head: str = "choose"

    def count(self, batch: LabelledBatch) -> int:
        return int((self.answers(batch) != IGNORE).sum())

    def answers(self, batch: LabelledBatch) -> Tensor:
        labels = known(batch)
        if len(labels) % self.choices:
            raise ValueError(f"a batch of {len(labels)} sequences holds no whole questions of {self.choices} choices")
        return labels.view(-1, self.choices)[:, 0]

    def loss(self, model: Encoder, batch: LabelledBatch) -> Loss:
        answers, count = self.answers(batch), self.count(batch)
        scores = wide(model(**inputs(batch), head=self.head)).view(-1, self.choices)
        right = (scores.detach().argmax(-1) == answers).sum()
        return Loss(F.cross_entropy(scores, answers, reduction="sum"), count, {"accuracy": (right, count)})


@dataclass(frozen=True)
class TokenClassification:
    """Cross-entropy of each token's tag: targets [B, T], IGNORE where there is none. Metric: `accuracy`."""

    head: str = "tag"

    def count(self, batch: Batch) -> int:
        return int((batch.targets != IGNORE).sum())

    def loss(self, model: Encoder, batch: Batch) -> Loss:
        tagged, count = batch.targets != IGNORE, self.count(batch)
        hidden = model.hidden(**inputs(batch))[tagged]
        logits, tags = wide(model.head(self.head)(hidden)), batch.targets[tagged]
        right = (logits.detach().argmax(-1) == tags).sum()
        return Loss(F.cross_entropy(logits, tags, reduction="sum"), count, {"accuracy": (right, count)})


@dataclass(frozen=True)
class SpanExtraction:
    """-log p(start) and -log p(end) among a sequence's own tokens (Devlin et al. 2018, sec. 4.2), a mean over both.

    Labels [B, 2]: the first and the last token of the answer, counted in its sequence; those that lie outside of it
    (an answer that was cut off) are left out. Metric: `exact`, the share of answers whose two ends are found.
    """

    head: str = "span"

    def count(self, batch: LabelledBatch) -> int:
        return int(self.inside(batch).sum())

    def inside(self, batch: LabelledBatch) -> Tensor:
        """Which ends lie in their sequences, [B, 2]."""
        labels, bounds = known(batch), Bounds.of_segments(batch.segments, padding=0)
        lengths = torch.tensor([length for _, length in bounds.sequences], device=labels.device)
        return (labels >= 0) & (labels < lengths[:, None])

    def loss(self, model: Encoder, batch: LabelledBatch) -> Loss:
        labels, inside = known(batch), self.inside(batch)
        logits = by_sequence(wide(model(**inputs(batch), head=self.head)), batch.segments)
        ends = torch.where(inside, labels, IGNORE)
        total = F.cross_entropy(logits, ends, ignore_index=IGNORE, reduction="sum")
        whole = inside.all(-1)
        exact = ((logits.detach().argmax(1) == labels).all(-1) & whole).sum()
        return Loss(total, self.count(batch), {"exact": (exact, int(whole.sum()))})


@dataclass(frozen=True)
class GenerativeFineTuning:
    """-log p(label | text) + weight * -log p(text), in nats a text, the second a mean over its tokens (Radford et al.
    2018, eq. 5, and its public code). `targets` are the next tokens. Metrics: `label`, `accuracy`, `lm`.

    The model is a decoder with two heads, for instance `with_heads(gpt, {"classify": SequenceHead.Config(labels=...,
    pool=LastToken()), "lm": gpt.cfg.head})`.
    """

    weight: float = 0.5
    head: str = "classify"
    lm_head: str = "lm"

    def count(self, batch: LabelledBatch) -> int:
        return len(known(batch))

    def loss(self, model: Encoder, batch: LabelledBatch) -> Loss:
        labels, count = known(batch), self.count(batch)
        ctx = model.context(batch.tokens, segments=batch.segments, positions=batch.positions)
        hidden = model.hidden(batch.tokens, types=batch.types, ctx=ctx)
        logits, head = wide(model.read(self.head, hidden, ctx.bounds)), model.head(self.lm_head)
        assert isinstance(head, Head), "the auxiliary objective needs a head over the vocabulary"
        label = F.cross_entropy(logits, labels, reduction="sum")
        alike: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # texts with equally many targets weigh alike
        for start, length in ctx.bounds.sequences:
            row, column = divmod(start, ctx.bounds.width)
            targets = batch.targets[row, column : column + length]
            alike[int((targets != IGNORE).sum())].append((hidden[row, column : column + length], targets))
        lm = label.new_zeros(())
        for targets_each, texts in alike.items():
            if targets_each:
                xs, goals = (torch.cat(parts) for parts in zip(*texts, strict=True))
                lm = lm + head.loss(xs, goals, model.embed).loss / targets_each
        right = (logits.detach().argmax(-1) == labels).sum()
        metrics = {"label": (label.detach(), count), "accuracy": (right, count), "lm": (lm.detach(), count)}
        return Loss(label + self.weight * lm, count, metrics)


def inputs(batch: Batch) -> dict[str, Any]:
    """What a model reads of a batch."""
    return {"tokens": batch.tokens, "segments": batch.segments, "positions": batch.positions, "types": batch.types}


def wide(x: Tensor) -> Tensor:
    """In at least float32: losses are sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def known(batch: LabelledBatch) -> Tensor:
    """The labels; raises ValueError for a batch without."""
    if batch.labels is None:
        raise ValueError("this batch has no labels; give each example a label")
    return batch.labels


def by_sequence(values: Tensor, segments: Tensor) -> Tensor:
    """values [B, T, n] as [sequences, longest, n], -inf behind a sequence's end."""
    bounds = Bounds.of_segments(segments, padding=0)
    index, offsets = bounds.index(values.device), bounds.offsets(values.device)
    inside = index >= 0
    out = values.new_full((len(bounds.sequences), bounds.longest, values.shape[-1]), -torch.inf)
    return out.index_put((index[inside], offsets[inside]), values[inside])

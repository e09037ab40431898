from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

import landmark
from landmark.data.batches import IGNORE
from landmark.data.labelled import Example, LabelledBatch, LabelledBatches, collate
from landmark.models.decoder import Decoder
from landmark.models.encoder import Encoder, with_heads
from landmark.nn.embedding import Head
from landmark.nn.heads import LastToken, SequenceHead
from landmark.objectives.classification import (
    GenerativeFineTuning,
    MultipleChoice,
    SequenceClassification,
    SpanExtraction,
    TokenClassification,
)

TINY = dict(
    vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20,
    max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0,
)  # fmt: skip
LENGTHS = (9, 5, 12, 7)
CLASSIFY = "ForSequenceClassification"


def build(task: str, **changes: Any) -> Encoder:
    torch.manual_seed(0)
    model = landmark.build({**TINY, "architectures": ["Bert" + task], **changes})
    assert isinstance(model, Encoder)
    torch.manual_seed(1)
    with torch.no_grad():  # larger weights, so that no gradient is too small to tell
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.double()


def batch(labels: Any = None, tags: bool = False, lengths: tuple[int, ...] = LENGTHS) -> LabelledBatch:
    rng = np.random.default_rng(0)
    examples = []
    for i, n in enumerate(lengths):
        targets = rng.integers(0, 3, n).tolist() if tags else None
        label = None if labels is None else labels[i]
        examples.append(Example(rng.integers(4, 61, n).tolist(), label, targets, rng.integers(0, 2, n).tolist()))
    return collate(examples)


def reference(model: Encoder, batch: LabelledBatch, directory: Path, **labels: torch.Tensor) -> Any:
    """The reference's output, loss included, for the same weights."""
    landmark.save(model, directory)
    assert model.origin is not None
    cls = getattr(transformers, model.origin.hf["architectures"][0])
    theirs = cls.from_pretrained(directory, dtype=torch.float64).eval()
    return theirs(batch.tokens, attention_mask=batch.segments, token_type_ids=batch.types, **labels)


CASES: dict[str, tuple[Any, Any]] = {
    "single_label_classification": ([2, 0, 1, 1], {"num_labels": 3}),
    "multi_label_classification": ([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]], {"num_labels": 2}),
    "regression": ([0.5, -1.0, 2.0, 0.0], {"num_labels": 1}),
}


@pytest.mark.parametrize("problem", CASES)
def test_sequences(problem: Any, tmp_path: Path) -> None:
    labels, changes = CASES[problem]
    names = {str(i): f"L{i}" for i in range(changes["num_labels"])}
    model = build(CLASSIFY, problem_type=problem, id2label=names)
    data = batch(labels)
    loss = SequenceClassification(problem).loss(model, data)
    assert data.labels is not None
    want = reference(model, data, tmp_path, labels=data.labels.to(torch.long if "single" in problem else torch.double))
    torch.testing.assert_close(loss.value, want.loss)
    assert loss.count == SequenceClassification(problem).count(data)
    if problem == "single_label_classification":
        assert int(loss.metrics["accuracy"][0]) == int((want.logits.argmax(-1) == data.labels).sum())


def test_unknown_classes_do_not_count() -> None:
    model, data = build(CLASSIFY, num_labels=3), batch([2, IGNORE, 1, IGNORE])
    loss = SequenceClassification().loss(model, data)
    logits = model(data.tokens, types=data.types, segments=data.segments)
    torch.testing.assert_close(loss.value, F.cross_entropy(logits[[0, 2]], torch.tensor([2, 1])))
    assert loss.count == 2


def test_tokens(tmp_path: Path) -> None:
    model, data = build("ForTokenClassification", num_labels=3), batch(tags=True)
    loss = TokenClassification().loss(model, data)
    want = reference(model, data, tmp_path, labels=data.targets)
    torch.testing.assert_close(loss.value, want.loss)
    assert loss.count == sum(LENGTHS) == loss.metrics["accuracy"][1]


def test_choices(tmp_path: Path) -> None:
    model, data = build("ForMultipleChoice"), batch([1, 1, 0, 0])
    loss = MultipleChoice(2).loss(model, data)
    scores = model(data.tokens, types=data.types, segments=data.segments).view(2, 2)
    torch.testing.assert_close(loss.value, F.cross_entropy(scores, torch.tensor([1, 0])))
    assert loss.count == 2
    with pytest.raises(ValueError, match="no whole questions"):
        MultipleChoice(3).count(data)


def test_spans(tmp_path: Path) -> None:
    """As the reference where a row is full; elsewhere an answer cannot begin in the padding."""
    full = batch([[2, 3], [0, 8], [4, 4], [8, 8]], lengths=(9, 9, 9, 9))
    model = build("ForQuestionAnswering")
    assert full.labels is not None
    loss = SpanExtraction().loss(model, full)
    starts, ends = full.labels.unbind(1)
    want = reference(model, full, tmp_path, start_positions=starts, end_positions=ends)
    torch.testing.assert_close(loss.value, want.loss)
    ragged = batch([[2, 3], [0, 4], [4, 12], [-1, -1]])  # the third's end and the fourth are cut off
    loss, alone = SpanExtraction().loss(model, ragged), []
    for i, (label, n) in enumerate(zip([[2, 3], [0, 4], [4]], LENGTHS, strict=False)):
        types = ragged.types[i : i + 1, :n]  # type: ignore[index]
        logits = model(ragged.tokens[i : i + 1, :n], types=types)[0]
        alone += [-logits.log_softmax(0)[at, end] for end, at in enumerate(label)]
    torch.testing.assert_close(loss.value, torch.stack(alone).mean())
    assert loss.count == SpanExtraction().count(ragged) == 5 and loss.metrics["exact"][1] == 2


def rows(data: LabelledBatch, first: int, last: int) -> LabelledBatch:
    names = ("tokens", "targets", "positions", "segments", "types", "labels")
    return replace(data, **{n: getattr(data, n)[first:last] for n in names if getattr(data, n) is not None})


def generative() -> tuple[Encoder, LabelledBatch]:
    """A decoder with a class for the last token and its language model, and texts with their next tokens."""
    torch.manual_seed(0)
    hf = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 61, "hidden_size": 24, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": 40,
    }  # fmt: skip
    decoder = landmark.build(hf)
    assert isinstance(decoder, Decoder)
    labels = SequenceHead.Config(labels=("no", "yes"), pool=LastToken())
    model = with_heads(decoder, {"classify": labels, "lm": decoder.cfg.head}).double()
    data = batch([1, 0, 0, 1], lengths=(9, 5, 12, 5))
    targets = torch.full_like(data.targets, IGNORE)
    targets[:, :-1] = torch.where(data.segments[:, 1:] > 0, data.tokens[:, 1:], IGNORE)
    return model, replace(data, targets=targets, types=None)


def test_auxiliary_language_model() -> None:
    """Radford et al. 2018, eq. 5, text by text."""
    model, data = generative()
    assert data.labels is not None
    loss, total = GenerativeFineTuning(weight=0.5).loss(model, data), []
    lm = model.head("lm")
    assert isinstance(lm, Head)
    for row, label, n in zip(data.tokens, data.labels, (9, 5, 12, 5), strict=True):
        hidden = model.hidden(row[None, :n])
        logits = model.head("classify").linear(hidden[:, -1])
        text = F.cross_entropy(lm(hidden[0, :-1], model.embed), row[1:n])
        total.append(F.cross_entropy(logits, label[None]) + 0.5 * text)
    torch.testing.assert_close(loss.value, torch.stack(total).mean())
    assert loss.count == GenerativeFineTuning().count(data) == 4
    assert torch.equal(
        model(data.tokens, segments=data.segments).argmax(-1).eq(data.labels).sum(), loss.metrics["accuracy"][0]
    )


def test_splitting_a_batch_changes_nothing() -> None:
    cases: list[tuple[Any, Encoder, LabelledBatch]] = [
        (SequenceClassification(), build(CLASSIFY, num_labels=3), batch([2, IGNORE, 1, 0])),
        (SequenceClassification("regression"), build(CLASSIFY, num_labels=1), batch(CASES["regression"][0])),
        (TokenClassification(), build("ForTokenClassification", num_labels=3), batch(tags=True)),
        (SpanExtraction(), build("ForQuestionAnswering"), batch([[2, 3], [0, 4], [4, 30], [1, 1]])),
        (MultipleChoice(2), build("ForMultipleChoice"), batch([1, 1, 0, 0])),
        (GenerativeFineTuning(), *generative()),
    ]
    for objective, model, data in cases:

        def gradient(parts: list[LabelledBatch], model: Encoder = model, objective: Any = objective) -> list[Any]:
            model.zero_grad()
            count = sum(objective.count(part) for part in parts)
            for part in parts:
                (objective.loss(model, part).sum / count).backward()
            return [p.grad for p in model.parameters() if p.grad is not None]

        whole, split = gradient([data]), gradient([rows(data, 0, 2), rows(data, 2, 4)])
        assert len(whole) == len(split) > 0
        for a, b in zip(whole, split, strict=True):
            torch.testing.assert_close(a, b)


def test_batches_without_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="no labels"):
        SequenceClassification().count(batch())


def test_fine_tuning_learns_which_token_comes_first() -> None:
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(576):
        tokens = rng.integers(6, 10, int(rng.integers(4, 12)))
        at, label = rng.choice(len(tokens), 2, replace=False), int(rng.integers(2))
        first, second = sorted(at)
        tokens[first], tokens[second] = (4, 5) if label else (5, 4)
        examples.append(Example([1, *tokens.tolist()], label=label))
    model = build(CLASSIFY, hidden_size=32).float().train()
    optimizer, objective = torch.optim.AdamW(model.parameters(), lr=2e-3), SequenceClassification()
    for data in LabelledBatches(examples[:512], 32, epochs=12):
        optimizer.zero_grad()
        objective.loss(model, data).value.backward()
        optimizer.step()
    right, n = objective.loss(model.eval(), collate(examples[512:])).metrics["accuracy"]
    assert int(right) >= 0.9 * n

from __future__ import annotations

import pydoc_data.topics
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
import transformers
from torch.nn import functional as F

import landmark
from landmark.data.batches import IGNORE, Batch
from landmark.data.labelled import LabelledBatch, LabelledBatches, collate, sentence_pairs, sentences
from landmark.data.masking import MaskedBatches, Masking
from landmark.models.encoder import Encoder
from landmark.nn.embedding import Head
from landmark.objectives.mlm import MaskedLM

TINY = dict(
    architectures=["BertForPreTraining"], vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=20, max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
MASKING = Masking(mask=3, vocab=61, special=frozenset({0, 1, 2}))


def build(**changes: object) -> Encoder:
    torch.manual_seed(0)
    model = landmark.build({**TINY, **changes})
    assert isinstance(model, Encoder)
    return model


def packed() -> Batch:
    """Two documents and padding in each row, under a mask."""
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(4, 61, (4, 30)))
    segments = torch.tensor([1] * 12 + [2] * 15 + [0] * 3).expand(4, -1)
    positions = torch.tensor([*range(12), *range(15), 0, 0, 0]).expand(4, -1)
    return MASKING(Batch(tokens=tokens, targets=tokens, positions=positions, segments=segments), 1)


def pairs(lengths: tuple[int, ...] = (17, 17, 17, 17)) -> LabelledBatch:
    """Sentence pairs with four hidden tokens each."""
    rng = np.random.default_rng(2)
    documents = [[rng.integers(4, 61, 7).tolist() for _ in range(4)] for _ in lengths]
    examples = sentence_pairs(documents, max(lengths), cls=1, sep=2)[: len(lengths)]
    examples = [e._replace(tokens=e.tokens[:n], types=e.types[:n]) for e, n in zip(examples, lengths, strict=True)]
    batch = collate(examples)
    targets = torch.full_like(batch.tokens, IGNORE)
    targets[:, [1, 3, 4, 8]] = batch.tokens[:, [1, 3, 4, 8]]
    return replace(batch, targets=targets, tokens=torch.where(targets >= 0, 3, batch.tokens))


def rows(batch: Batch, first: int, last: int) -> Batch:
    names = ("tokens", "targets", "positions", "segments", "types", "labels")
    found = {name: getattr(batch, name, None) for name in names}
    return replace(batch, **{name: value[first:last] for name, value in found.items() if value is not None})


def test_loss_is_the_mean_over_hidden_tokens() -> None:
    model, batch = build().double(), packed()
    loss = MaskedLM().loss(model, batch)
    logits = model(batch.tokens, segments=batch.segments, positions=batch.positions)
    torch.testing.assert_close(loss.value, F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))
    assert loss.count == MaskedLM().count(batch) == int((batch.targets != IGNORE).sum()) > 0
    assert set(loss.metrics) == {"mlm"}


def test_pairs_add_the_mean_of_their_losses_as_the_reference(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, batch = build(), pairs()
    landmark.save(model, tmp_path)
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path).double().eval()
    want = theirs(
        batch.tokens, attention_mask=batch.segments, token_type_ids=batch.types, labels=batch.targets,
        next_sentence_label=batch.labels,
    )  # fmt: skip
    loss = MaskedLM().loss(model.double(), batch)
    torch.testing.assert_close(loss.value, want.loss)
    right, n = loss.metrics["pair_accuracy"]
    assert n == 4 and int(right) == int((want.seq_relationship_logits.argmax(-1) == batch.labels).sum())


def test_order_of_sentences() -> None:
    model = build(architectures=["AlbertForPreTraining"], embedding_size=8)
    loss = MaskedLM().loss(model, pairs())
    assert loss.metrics["pair"][1] == 4 and torch.isfinite(loss.value)


def gradient(model: Encoder, batches: list[Batch]) -> list[torch.Tensor]:
    model.zero_grad()
    count = sum(MaskedLM().count(batch) for batch in batches)
    for batch in batches:
        (MaskedLM().loss(model, batch).sum / count).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_splitting_a_batch_changes_nothing() -> None:
    model = build().double()
    for batch in (packed(), pairs((17, 11, 14, 9))):
        whole = gradient(model, [batch])
        split = gradient(model, [rows(batch, 0, 1), rows(batch, 1, 4)])
        assert len(whole) == len(split)
        for a, b in zip(whole, split, strict=True):
            torch.testing.assert_close(a, b)


def test_the_head_sees_hidden_tokens_only() -> None:
    model, batch, seen = build(), packed(), []
    head = model.head("mlm")
    assert isinstance(head, Head) and head.transform is not None
    head.transform.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    MaskedLM().loss(model, batch)
    assert seen == [(MaskedLM().count(batch), 24)]


def test_a_batch_that_hides_nothing() -> None:
    batch = packed()
    loss = MaskedLM().loss(build(), replace(batch, targets=torch.full_like(batch.targets, IGNORE)))
    assert loss.count == 0 and float(loss.sum.detach()) == 0.0


def test_a_small_bert_learns_real_text() -> None:
    """Bytes of Python's documentation, in pairs of sentences: both losses fall below what guessing gives."""
    text = list(pydoc_data.topics.topics.values())[:40]
    documents = [[list(s.encode()) for s in sentences(page)] for page in text]
    masking = Masking(mask=256, vocab=260, special=frozenset({256, 257, 258, 259}))
    source = LabelledBatches(
        lambda epoch: sentence_pairs(documents, 64, cls=257, sep=258, epoch=epoch), 16, pad=259, width=64
    )
    model = build(vocab_size=260, hidden_size=64, intermediate_size=128, max_position_embeddings=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for batch in islice(MaskedBatches(source, masking), 60):
        loss = MaskedLM().loss(model, batch)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        total, count = loss.metrics["mlm"]
        losses.append(float(total) / count)
    first, last = float(np.mean(losses[:3])), float(np.mean(losses[-10:]))
    assert first > 4.5 and last < 3.3, (first, last)

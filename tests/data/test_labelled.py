from __future__ import annotations

from itertools import islice

import pytest
import torch

from landmark.data.batches import IGNORE
from landmark.data.labelled import Example, LabelledBatches, collate, sentence_pairs, sentences

CLS, SEP = 1, 2


def test_collate() -> None:
    batch = collate([Example([5, 6, 7], label=1, types=[0, 1, 1]), Example([8], label=0, targets=[4])], pad=9, width=4)
    assert batch.tokens.tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch.segments.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert batch.targets.tolist() == [[IGNORE] * 4, [4, IGNORE, IGNORE, IGNORE]]
    assert batch.types is not None and batch.types.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
    assert batch.labels is not None and batch.labels.tolist() == [1, 0]
    assert batch.to("cpu").labels is not None
    assert collate([Example([1], label=[0.5, 1.0])]).labels.dtype == torch.float32  # type: ignore[union-attr]


def test_collate_refuses() -> None:
    for examples, message in (
        ([Example([1, 2, 3])], "does not fit"),
        ([], "at least one"),
        ([Example([])], "at least one token"),
        ([Example([1], label=1), Example([1])], "some have none"),
        ([Example([1], targets=[1, 2])], "1 tokens, but"),
    ):
        with pytest.raises(ValueError, match=message):
            collate(examples, width=2)


def tokens_of(batches: list) -> list[int]:
    return [row[0] for batch in batches for row in batch.tokens.tolist()]


def test_batches_resume_and_are_shared_out() -> None:
    examples = [Example([i], label=i) for i in range(10)]
    whole = list(LabelledBatches(examples, 4, seed=3, epochs=2))
    assert [len(batch.tokens) for batch in whole] == [4, 4, 4, 4, 4]
    seen = tokens_of(whole)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert torch.equal(torch.cat([batch.labels for batch in whole]), torch.tensor(seen))
    run = LabelledBatches(examples, 4, seed=3, epochs=2)
    for used in range(5):
        resumed = LabelledBatches(examples, 4, seed=3, epochs=2)
        resumed.load_state_dict(run.state_dict())
        assert tokens_of(list(resumed)) == seen[4 * used :]
        next(run)
    ranks = [list(LabelledBatches(examples, 4, seed=3, epochs=2, rank=rank, world=2)) for rank in (0, 1)]
    assert tokens_of([part for pair in zip(*ranks, strict=True) for part in pair]) == seen
    assert tokens_of(list(islice(LabelledBatches(examples, 4, seed=3), 5))) == seen
    assert len(list(LabelledBatches(examples, 8, seed=3, epochs=1))[-1].tokens) == 2
    with pytest.raises(ValueError, match="seed 3"):
        LabelledBatches(examples, 4, seed=4).load_state_dict(run.state_dict())
    with pytest.raises(ValueError, match="multiple"):
        LabelledBatches(examples, 3, world=2)
    with pytest.raises(ValueError, match="no examples"):
        LabelledBatches([], 2)


def test_what_belongs_together_stays_together() -> None:
    examples = [Example([i], label=i // 3) for i in range(30)]
    batches = list(LabelledBatches(examples, 4, seed=3, epochs=1, together=3))
    assert [len(batch.tokens) for batch in batches] == [12, 12, 6]
    seen = tokens_of(batches)
    assert sorted(seen) == list(range(30)) and seen != sorted(seen)
    assert all(seen[i] % 3 == 0 and seen[i : i + 3] == [*range(seen[i], seen[i] + 3)] for i in range(0, 30, 3))
    with pytest.raises(ValueError, match="no whole groups of 4"):
        LabelledBatches(examples, 4, together=4)


def test_sentences() -> None:
    text = "One is here. Is two? Yes!\nThree lines\non.\n\nFour v1.5 ends\n\n\n"
    assert sentences(text) == ["One is here.", "Is two?", "Yes!", "Three lines\non.", "Four v1.5 ends"]


# Document d has sentences of tokens 1000 d + 10 s + 3.. so that every token says where it comes from.
DOCUMENTS = [[[1000 * d + 10 * s + 3 + k for k in range(1 + (s + d) % 5)] for s in range(30)] for d in range(1, 9)]


def parts(example: Example) -> tuple[list[int], list[int]]:
    assert example.types is not None
    tokens, types = list(example.tokens), list(example.types)
    middle = tokens.index(SEP)
    assert tokens[0] == CLS and tokens[-1] == SEP and tokens.count(SEP) == 2
    assert types == [0] * (middle + 1) + [1] * (len(tokens) - middle - 1)
    first, second = tokens[1:middle], tokens[middle + 1 : -1]
    assert first and second and len(tokens) <= 24
    return first, second


def test_next_sentence_pairs() -> None:
    examples = [e for epoch in range(20) for e in sentence_pairs(DOCUMENTS, 24, cls=CLS, sep=SEP, epoch=epoch)]
    share = sum(example.label == 1 for example in examples) / len(examples)
    assert len(examples) > 1000 and 0.45 < share < 0.6
    for example in examples:
        first, second = parts(example)
        same = first[0] // 1000 == second[0] // 1000
        assert same == (example.label == 0)
        assert len({token // 1000 for token in first}) == len({token // 1000 for token in second}) == 1
        if same:
            assert first[-1] < second[0]
    first_epoch = sentence_pairs(DOCUMENTS, 24, cls=CLS, sep=SEP, epoch=0)
    assert first_epoch == sentence_pairs(DOCUMENTS, 24, cls=CLS, sep=SEP, epoch=0)
    assert first_epoch != sentence_pairs(DOCUMENTS, 24, cls=CLS, sep=SEP, epoch=1)


def test_displaced_sentences_are_used_again() -> None:
    """Every sentence stands somewhere where it is not drawn at random, however short the pairs."""
    long = sentence_pairs(DOCUMENTS, 4000, cls=CLS, sep=SEP)
    seen = {token for e in long for token in e.tokens[: e.tokens.index(SEP)]}
    seen |= {token for e in long if e.label == 0 for token in e.tokens}
    assert seen >= {token for document in DOCUMENTS for sentence in document for token in sentence}


def test_sentence_order_pairs() -> None:
    examples = [
        e for epoch in range(20) for e in sentence_pairs(DOCUMENTS, 24, cls=CLS, sep=SEP, order="swap", epoch=epoch)
    ]
    share = sum(example.label == 1 for example in examples) / len(examples)
    assert abs(share - 0.5) < 5 * 0.5 / len(examples) ** 0.5
    for example in examples:
        first, second = parts(example)
        assert first[0] // 1000 == second[0] // 1000
        assert (first[-1] < second[0]) == (example.label == 0)


def test_pairs_refuse() -> None:
    with pytest.raises(ValueError, match="at least 5"):
        sentence_pairs(DOCUMENTS, 4, cls=CLS, sep=SEP)
    with pytest.raises(ValueError, match="at least two"):
        sentence_pairs(DOCUMENTS[:1], 24, cls=CLS, sep=SEP)

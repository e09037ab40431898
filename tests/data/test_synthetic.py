"""Made-up tasks: what is asked for is there to be found, and batches are what their number says."""

from __future__ import annotations

import pytest
import torch

from landmark.data.batches import IGNORE
from landmark.data.synthetic import MQAR, InductionHeads, Rewriting, SelectiveCopying, Synthetic, Task


def test_selective_copying() -> None:
    batch = SelectiveCopying(length=32, count=4).batch(8, seed=1)
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
        said = tokens[:32][tokens[:32] > 1]
        assert torch.equal(said, targets[32:]) and (targets[:32] == IGNORE).all() and (tokens[32:] == 1).all()


def test_induction_heads() -> None:
    task = InductionHeads(length=16, symbols=5)
    batch = task.batch(64, seed=2)
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
        (first,) = (tokens[:-1] == 5).nonzero().flatten().tolist()
        assert tokens[-1] == 5 and targets[-1] == tokens[first + 1]
    assert (batch.targets != IGNORE).sum() == 64


def test_mqar() -> None:
    task = MQAR(pairs=3, length=20, symbols=12)
    batch = task.batch(16, seed=3)
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
        value = dict(zip(tokens[:6:2].tolist(), tokens[1:6:2].tolist(), strict=True))
        asked = (targets != IGNORE).nonzero().flatten().tolist()
        assert len(asked) == 3 and min(asked) >= 6
        assert all(targets[i] == value[int(tokens[i])] for i in asked)


@pytest.mark.parametrize("task", [SelectiveCopying(), InductionHeads(), MQAR()])
def test_batches_resume_and_are_within_the_vocabulary(task: Task) -> None:
    batches = Synthetic(task, 4, seed=5)
    first, second = next(batches), next(batches)
    assert not torch.equal(first.tokens, second.tokens)
    again = Synthetic(task, 4, seed=5)
    again.load_state_dict({"made": 1})
    assert torch.equal(next(again).tokens, second.tokens)
    assert int(second.tokens.max()) < task.vocab and int(second.targets.max()) < task.vocab


def test_a_length_too_short() -> None:
    with pytest.raises(ValueError, match=r"MQAR\.length is 8, too short for 4 pairs"):
        MQAR(pairs=4, length=8)


def test_rewriting() -> None:
    task = Rewriting(symbols=6, doubled=2, shortest=2, longest=5)
    batch = task.batch(32, seed=4)
    for row, (source, target) in enumerate(task.pairs(32, seed=4)):
        said = [x for x in source[::-1] for _ in range(2 if x in (2, 3) else 1)]
        assert target == said
        assert batch.source[row][batch.source_segments[row] == 1].tolist() == source
        inside = batch.target_segments[row] == 1
        assert batch.target_in[row][inside].tolist() == [task.START, *said]
        assert batch.target_out[row][inside].tolist() == [*said, task.END]
        assert (batch.target_out[row][~inside] == IGNORE).all()
    astray = Rewriting(**{**vars(task), "astray": True}).pairs(32, seed=4)
    assert [t for _, t in astray] == [t for _, t in task.pairs(32, seed=4)]
    assert sorted(s for s, _ in astray) == sorted(s for s, _ in task.pairs(32, seed=4))
    with pytest.raises(ValueError, match="more than longest 5"):
        Rewriting(shortest=6, longest=5)

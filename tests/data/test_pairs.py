"""Pairs for sequence-to-sequence models: shifted by the start token, bucketed by length, resumed exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from landmark.data.batches import IGNORE
from landmark.data.corpora import Document, InMemory
from landmark.data.pairs import Seq2SeqBatch, Seq2SeqBatches
from landmark.data.shards import Shards, write_shards
from landmark.weights.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def sides(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Shards, Shards]:
    rng = np.random.default_rng(0)
    items = tuple(
        Document(f"{i}" + " a" * int(rng.integers(1, 30)), str(i), f"{i}" + " b" * int(rng.integers(1, 30)))
        for i in range(300)
    )
    folder = tmp_path_factory.mktemp("pairs")
    write = [write_shards(InMemory(items), tokenizer, folder / side, side=side, progress=False) for side in SIDES]
    return write[0], write[1]


SIDES = ("text", "target")


def rows(batch: Seq2SeqBatch) -> list[tuple[list[int], list[int]]]:
    """(source, target) ids of each pair, after a check of the form of the batch."""
    found = []
    for row in range(batch.source.shape[0]):
        source_length, target_length = int(batch.source_segments[row].sum()), int(batch.target_segments[row].sum())
        if not source_length:
            assert not target_length and (batch.target_out[row] == IGNORE).all()
            continue
        assert batch.source_segments[row].tolist() == [1] * source_length + [0] * (
            batch.source.shape[1] - source_length
        )
        out = batch.target_out[row].tolist()
        said = out[:target_length]
        assert IGNORE not in said and set(out[target_length:]) <= {IGNORE}
        start = batch.target_in[row, 0].item()
        assert batch.target_in[row].tolist()[: target_length + 1][:target_length] == [start, *said[:-1]]
        found.append((batch.source[row].tolist()[:source_length], said))
    return found


def test_every_pair_once_an_epoch(sides: tuple[Shards, Shards], tokenizer: Tokenizer) -> None:
    source, target = sides
    batches = Seq2SeqBatches(source, target, 256, longest=200, epochs=1)
    found, cells, real, n_bytes = [], 0, 0, 0
    for batch in batches:
        assert max(batch.source.numel(), batch.target_in.numel()) <= 256
        assert batch.target_in[:, 0].eq(tokenizer.bos_id).all()
        found += rows(batch)
        cells += batch.target_in.numel()
        real += int(batch.target_segments.sum())
        n_bytes += batch.n_bytes
    expected = [(source[i].tolist(), target[i].tolist()) for i in range(300)]
    assert sorted(found) == sorted(expected)
    assert all(said[-1] == tokenizer.eos_id for _, said in found)
    assert real / cells > 0.9  # bucketing leaves little padding
    assert n_bytes == target.bytes
    assert batches.dropped == 0


def test_too_long_pairs_are_left_out(sides: tuple[Shards, Shards]) -> None:
    source, target = sides
    batches = Seq2SeqBatches(source, target, 256, longest=20, epochs=1)
    found = [pair for batch in batches for pair in rows(batch)]
    fits = np.maximum(source.lengths, target.lengths) <= 20
    assert len(found) == fits.sum() == 300 - batches.dropped
    assert all(max(map(len, pair)) <= 20 for pair in found)


def test_resume_and_ranks(sides: tuple[Shards, Shards]) -> None:
    def make(rank: int = 0, world: int = 1, seed: int = 1) -> Seq2SeqBatches:
        return Seq2SeqBatches(*sides, 300, longest=100, buffer=64, seed=seed, rank=rank, world=world)

    batches, states, expected = make(), [], []
    for _ in range(30):
        states.append(json.dumps(batches.state_dict()))
        expected.append(next(batches))
    for at in (0, 1, 7, 29):
        for world in (1, 2, 3):
            parts = [make(rank, world) for rank in range(world)]
            for part in parts:
                part.load_state_dict(json.loads(states[at]))
            got = [next(part) for part in parts]
            for name in ("source", "target_in", "target_out", "source_segments", "target_segments"):
                joined = torch.cat([getattr(batch, name) for batch in got])
                whole = getattr(expected[at], name)
                assert torch.equal(joined[: len(whole)], whole)
                if name.endswith("segments"):
                    assert not joined[len(whole) :].any()
            assert sum(batch.n_bytes for batch in got) == expected[at].n_bytes
    assert not torch.equal(next(make(seed=2)).source, expected[0].source)
    with pytest.raises(ValueError, match="seed was 1, is 2"):
        make(seed=2).load_state_dict(json.loads(states[0]))


def test_errors(sides: tuple[Shards, Shards], tokenizer: Tokenizer, tmp_path: Path) -> None:
    source, target = sides
    with pytest.raises(ValueError, match=r"no pair of .* has from 1 to 2 tokens on both sides; raise longest"):
        Seq2SeqBatches(source, target, 256, longest=2)
    with pytest.raises(ValueError, match="10 tokens cannot hold a pair of 512"):
        Seq2SeqBatches(source, target, 10)
    other = write_shards(InMemory.of(["x"]), tokenizer, tmp_path, progress=False)
    with pytest.raises(ValueError, match="are not the two sides of one corpus"):
        Seq2SeqBatches(source, other, 1024)

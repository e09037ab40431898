"""Packing and batches: every token once, no target across a boundary, stopped and resumed exactly on any ranks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from landmark.data.batches import IGNORE, Batch, Batches
from landmark.data.corpora import InMemory
from landmark.data.order import DocumentStream, Source
from landmark.data.packing import PACKINGS as PACKERS
from landmark.data.packing import Row
from landmark.data.shards import Shards, write_shards
from landmark.weights.tokenizer import Tokenizer
from landmark.weights.tokenizer_train import train_tokenizer

MakeShards = Callable[..., Shards]
PACKINGS = list(PACKERS)


def fragments(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(tokens, targets) of each segment, after a check of the form of the batch."""
    found = []
    for row in range(batch.tokens.shape[0]):
        segments, positions = batch.segments[row].tolist(), batch.positions[row].tolist()
        count = max(segments)
        padding = segments.count(0)
        assert segments == [s for s in range(1, count + 1) for _ in range(segments.count(s))] + [0] * padding
        for segment in range(1, count + 1):
            at = [i for i, s in enumerate(segments) if s == segment]
            assert [positions[i] for i in at] == list(range(len(at)))
            found.append((batch.tokens[row][at].tolist(), batch.targets[row][at].tolist()))
        assert (batch.targets[row][batch.segments[row] == 0] == IGNORE).all()
    return found


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_token_once_and_no_target_crosses(
    packing: Any, data: st.DataObject, make_shards: MakeShards, tokenizer: Tokenizer
) -> None:
    lengths = data.draw(st.lists(st.integers(5, 40), min_size=1, max_size=25))
    shards = make_shards(lengths, shard_tokens=data.draw(st.sampled_from([30, 1 << 20])))
    length, rows, epochs = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 2))
    options: dict[str, Any] = dict(
        seed=data.draw(st.integers(0, 99)), shuffle=data.draw(st.booleans()), buffer=data.draw(st.integers(1, 9))
    )
    # The plan: every place of every document once an epoch, rows no longer than they may be.
    stream = DocumentStream([Source(shards)], options["seed"], options["shuffle"], epochs)
    plan: list[Row] = []
    while planned := PACKERS[packing](stream, length, options["buffer"]):
        plan += planned
    assert all(0 < sum(fragment.length for fragment in row) <= length for row in plan)
    places = Counter((f.document, f.start + i) for row in plan for f in row for i in range(f.length))
    assert places == {(i, at): epochs for i, size in enumerate(lengths) for at in range(size)}
    if packing == "concatenate":
        assert all(sum(fragment.length for fragment in row) == length for row in plan[:-1])

    # The tokens: each fragment is a part of one document, its targets what follows there, up to the document's end.
    documents = [shards[i].tolist() for i in range(len(shards))]
    inputs: Counter[int] = Counter()
    n_bytes = 0
    for batch in Batches(shards, rows, length, packing=packing, epochs=epochs, **options):
        assert batch.tokens.shape[1] == length and batch.tokens.shape[0] <= rows
        n_bytes += batch.n_bytes
        for tokens, targets in fragments(batch):
            inputs.update(tokens)
            assert any(
                document[at : at + len(tokens)] == tokens
                and [*document[at + 1 : at + len(tokens) + 1], IGNORE][: len(tokens)] == targets
                for document in documents
                for at in range(len(document) - len(tokens) + 1)
            )
            if packing == "best-fit":
                assert len(tokens) == length or targets[-1] == IGNORE
    assert inputs == {i: n * epochs for i, n in Counter(i for d in documents for i in d).items()}
    covered = sum(len(tokenizer.token_bytes(i)) for d in documents for i in d[1:] if i != tokenizer.eos_id)
    assert n_bytes == epochs * covered


def test_a_batch_by_hand(make_shards: MakeShards) -> None:
    shards = make_shards([5, 4, 7])
    a, b, c = (shards[i].tolist() for i in range(3))
    first, second = list(Batches(shards, 1, 8, shuffle=False, epochs=1))
    assert first.tokens.tolist() == [a + b[:3]]
    assert first.targets.tolist() == [[*a[1:], IGNORE, *b[1:4]]]
    assert first.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert first.segments.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2]]
    assert second.tokens.tolist() == [b[3:] + c]
    assert second.targets.tolist() == [[IGNORE, *c[1:], IGNORE]]
    assert second.segments.tolist() == [[1, 2, 2, 2, 2, 2, 2, 2]]
    (both,) = list(Batches(shards, 4, 8, shuffle=False, epochs=1, packing="best-fit"))
    pad = shards.meta["pad_id"]
    assert both.tokens.tolist() == [[*c, pad], a + [pad] * 3, b + [pad] * 4]
    assert both.padding == 8 / 24
    moved = both.to("cpu")
    assert torch.equal(moved.tokens, both.tokens) and moved.n_bytes == both.n_bytes and moved.types is None


def test_best_fit_cuts_nothing_that_fits_and_pads_little(make_shards: MakeShards) -> None:
    lengths = np.random.default_rng(0).integers(4, 100, 400).tolist()
    shards = make_shards(lengths)
    found, padding = [], []
    for batch in Batches(shards, 4, 128, packing="best-fit", epochs=1):
        found += [len(tokens) for tokens, _ in fragments(batch)]
        padding.append(batch.padding)
    assert sorted(found) == sorted(lengths)
    assert np.mean(padding[:-1]) < 0.02


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_of_a_batch_come_from_different_documents(packing: Any, make_shards: MakeShards) -> None:
    shards = make_shards([400] * 20)
    whole = [shards[i].tolist() for i in range(20)]

    def home(tokens: list[int]) -> int:
        parts = ((i, at) for i in range(20) for at in range(401 - len(tokens)))
        return next(i for i, at in parts if whole[i][at : at + len(tokens)] == tokens)

    for shuffle in (False, True):
        batch = next(Batches(shards, 8, 16, packing=packing, shuffle=shuffle))
        homes = {home(tokens) for tokens, _ in fragments(batch)}
        assert (len(homes) >= 4) == shuffle


# -- order -------------------------------------------------------------------------------------------------------------


def same(a: Batch, b: Batch) -> bool:
    names = ("tokens", "targets", "positions", "segments")
    return a.n_bytes == b.n_bytes and all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def mixture(make_shards: MakeShards) -> list[Source]:
    rng = np.random.default_rng(1)
    sizes = [rng.integers(4, high, 60).tolist() for high in (30, 90)]
    return [Source(make_shards(s, shard_tokens=500, tag="ab"[i]), [1.0, 2.5][i]) for i, s in enumerate(sizes)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_resume_at_any_batch(packing: Any, make_shards: MakeShards) -> None:
    sources = mixture(make_shards)

    def fresh(rows: int = 4) -> Batches:
        return Batches(sources, rows, 32, packing=packing, seed=5, buffer=7)

    batches, states, expected = fresh(), [], []
    for _ in range(40):
        states.append(json.dumps(batches.state_dict()))
        expected.append(next(batches))
    assert all(len(state) < 700 for state in states)
    for at in range(0, 40, 3):
        resumed = fresh()
        next(resumed)  # what came before the load does not matter
        resumed.load_state_dict(json.loads(states[at]))
        assert json.dumps(resumed.state_dict()) == states[at]
        for batch in expected[at : at + 5]:
            assert same(next(resumed), batch)
    wider = fresh(8)  # another batch size goes on with the same rows
    wider.load_state_dict(json.loads(states[10]))
    batch = next(wider)
    assert torch.equal(batch.tokens, torch.cat([expected[10].tokens, expected[11].tokens]))


def test_the_end_of_finite_epochs_is_resumed_too(make_shards: MakeShards) -> None:
    shards = make_shards([10, 20, 30, 5])
    batches = Batches(shards, 2, 16, epochs=2, buffer=3)
    states = []
    for _ in batches:
        states.append(batches.state_dict())
    rest = []
    for state in states:
        resumed = Batches(shards, 2, 16, epochs=2, buffer=3)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        rest.append(len(list(resumed)))
    assert rest == list(range(len(states) - 1, -1, -1))


def test_resume_in_another_process(make_shards: MakeShards) -> None:
    shards = make_shards([9, 30, 14, 70, 5] * 5)
    batches = Batches(shards, 2, 16, seed=9, buffer=5)
    for _ in range(7):
        next(batches)
    state = json.dumps(batches.state_dict())
    program = (
        "import json, sys; from landmark.data.batches import Batches; from landmark.data.shards import Shards\n"
        "batches = Batches(Shards(sys.argv[1]), 2, 16, seed=9, buffer=5)\n"
        "batches.load_state_dict(json.loads(sys.argv[2]))\n"
        "print(json.dumps([next(batches).tokens.tolist() for _ in range(6)]))"
    )
    command = [sys.executable, "-c", program, str(shards.folder), state]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == [next(batches).tokens.tolist() for _ in range(6)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_ranks_share_the_batch_and_resume_on_other_ranks(packing: Any, make_shards: MakeShards) -> None:
    sources = mixture(make_shards)

    def ranks(world: int) -> list[Batches]:
        options: dict[str, Any] = dict(packing=packing, seed=2, buffer=5)
        return [Batches(sources, 12, 16, rank=rank, world=world, **options) for rank in range(world)]

    def union(parts: list[Batches]) -> Batch:
        batches = [next(part) for part in parts]
        names = ("tokens", "targets", "positions", "segments")
        joined = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
        return Batch(**joined, n_bytes=sum(batch.n_bytes for batch in batches))

    expected = [next(batches) for batches in ranks(1) * 1 for _ in range(9)]
    parts = ranks(1)
    for step, world in enumerate([1, 2, 2, 4, 3, 12, 1, 6, 2]):
        states = {json.dumps(part.state_dict()) for part in parts}
        assert len(states) == 1  # ranks agree on where they are
        parts = ranks(world)
        for part in parts:
            part.load_state_dict(json.loads(next(iter(states))))
        assert same(union(parts), expected[step])


def test_last_batch_on_several_ranks(make_shards: MakeShards) -> None:
    shards = make_shards([16, 16, 16])
    ends = [list(Batches(shards, 4, 16, epochs=1, rank=rank, world=2, shuffle=False)) for rank in range(2)]
    (first,), (second,) = ends
    assert first.tokens.shape == second.tokens.shape == (2, 16)
    assert second.segments[1].sum() == 0 and (second.targets[1] == IGNORE).all()
    assert (first.segments > 0).sum() + (second.segments > 0).sum() == 48


def test_order_depends_on_the_seed_and_the_epoch(make_shards: MakeShards) -> None:
    shards = make_shards([16] * 30)
    orders = [
        torch.cat([batch.tokens for batch in Batches(shards, 1, 16, seed=seed, epochs=2)]).tolist()
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:30] != orders[0][30:] and sorted(orders[0][:30]) == sorted(orders[0][30:])
    plain = torch.cat([batch.tokens for batch in Batches(shards, 1, 16, shuffle=False, epochs=1)]).tolist()
    assert plain == [shards[i].tolist() for i in range(30)]


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_errors(make_shards: MakeShards, tmp_path_factory: pytest.TempPathFactory) -> None:
    shards = make_shards([20, 30])
    message = r"holds 50 tokens, fewer than one batch of 4 x 16 = 64: give more text, fewer rows or a shorter context"
    with pytest.raises(ValueError, match=message):
        Batches(shards, 4, 16)
    assert len(list(Batches(shards, 4, 16, epochs=1))) == 1  # evaluation takes what there is
    with pytest.raises(ValueError, match="4 rows for rank 0 of 3 processes: rows must be a multiple"):
        Batches(shards, 4, 8, world=3)
    with pytest.raises(ValueError, match="packing 'tight': choose one of concatenate, best-fit"):
        Batches(shards, 1, 8, packing="tight")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a batch of -1 rows of 8 tokens"):
        Batches(shards, -1, 8)
    state = Batches(shards, 1, 16, seed=1).state_dict()
    with pytest.raises(ValueError, match="seed was 1, is 2; length was 16, is 8; use that run's settings"):
        Batches(shards, 1, 8, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="corpora was"):
        Batches(make_shards([20, 31]), 1, 16, seed=1).load_state_dict(state)
    other = train_tokenizer("bpe", ["some text to train on"], 280)
    folder = tmp_path_factory.mktemp("other")
    different = write_shards(InMemory.of(["a b c"] * 9), other, folder, progress=False)
    with pytest.raises(ValueError, match="different tokenizers; tokenise them with one"):
        Batches([Source(shards), Source(different)], 1, 8)


def test_packing_costs_little(make_shards: MakeShards) -> None:
    shards = make_shards(np.random.default_rng(0).integers(10, 900, 1000).tolist())
    for packing in PACKINGS:
        batches = Batches(shards, 16, 2048, packing=packing)  # type: ignore[arg-type]
        next(batches)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            next(batches)
            times.append(time.perf_counter() - start)
        assert np.median(times) / 16 < 0.5e-3  # seconds per 2048 tokens; measured about 0.03e-3

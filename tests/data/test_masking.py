from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models

from landmark.data.batches import IGNORE, Batch
from landmark.data.masking import MaskedBatches, Masking, word_starts
from landmark.weights.tokenizer import Tokenizer

VOCAB, MASK, SPECIAL = 100, 3, frozenset({0, 1, 2})
STARTS = np.arange(VOCAB) % 3 != 2  # a third of all tokens continue a word


def batch(rows: int = 64, width: int = 200, seed: int = 0) -> Batch:
    """Two documents a row with special tokens at their ends, and padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, VOCAB, (rows, width))
    tokens[:, [0, 90]], tokens[:, [89, 179]], tokens[:, 180:] = 1, 2, 0
    segments = np.repeat([[1, 2, 0]], rows, 0).repeat([90, 90, width - 180], 1)
    whole = torch.from_numpy(tokens), torch.from_numpy(segments)
    return Batch(tokens=whole[0], segments=whole[1], targets=whole[0], positions=torch.zeros_like(whole[0]))


def within(share: float, wanted: float, draws: int) -> None:
    """A binomial share within five standard deviations."""
    assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / draws) ** 0.5, (share, wanted)


KINDS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "words": {"word_starts": STARTS},
    "spans": {"span": 0.2},
    "spans of words": {"span": 0.4, "word_starts": STARTS, "longest": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_shares(kind: str) -> None:
    plain = batch()
    masked = Masking(mask=MASK, vocab=VOCAB, special=SPECIAL, **KINDS[kind])(plain, 7)
    chosen = masked.targets != IGNORE
    ordinary = (plain.segments > 0) & (plain.tokens > 2)
    assert not (chosen & ~ordinary).any()
    assert torch.equal(masked.targets[chosen], plain.tokens[chosen])
    assert torch.equal(masked.tokens[~chosen], plain.tokens[~chosen])
    per_row = chosen.sum(1) / ordinary.sum(1)
    assert (per_row - 0.15).abs().max() < 1 / 176 + 1e-6
    assert abs(per_row.mean() - 0.15) < 5 * 0.5 / 176 / 64**0.5
    n = int(chosen.sum())
    groups = n if "span" not in kind else n // 4  # what a span has in common
    was, now = plain.tokens[chosen], masked.tokens[chosen]
    within(float((now == MASK).float().mean()), 0.8, groups)
    drawn = (now != MASK) & (now != was)
    within(float(drawn.float().mean()), 0.1 * 95 / 96, groups)
    assert not any((now[drawn] == special).any() for special in (*SPECIAL, MASK))
    assert len(now[drawn].unique()) > 60


def test_other_shares() -> None:
    masked = Masking(mask=MASK, vocab=VOCAB, special=SPECIAL, probability=0.4, replaced=1.0, random=0.0)(batch(), 1)
    chosen = masked.targets != IGNORE
    assert abs(chosen.sum() / (64 * 176) - 0.4) < 0.01
    assert (masked.tokens[chosen] == MASK).all()


def words_of(row: np.ndarray, segments: np.ndarray) -> list[list[int]]:
    words: list[list[int]] = []
    for i, (token, segment) in enumerate(zip(row, segments, strict=True)):
        if segment and token > 2:
            joins = words and words[-1][-1] == i - 1 and segments[i - 1] == segment and not STARTS[token]
            (words[-1].append(i) if joins else words.append([i]))
    return words


def test_words_are_whole() -> None:
    plain = batch()
    masked = Masking(mask=MASK, vocab=VOCAB, special=SPECIAL, word_starts=STARTS)(plain, 5)
    chosen, together = (masked.targets != IGNORE).numpy(), 0
    for row, segments, hides in zip(plain.tokens.numpy(), plain.segments.numpy(), chosen, strict=True):
        for word in words_of(row, segments):
            assert hides[word].all() or not hides[word].any()
            together += len(word) > 1 and bool(hides[word].all())
    assert together > 100


def test_spans_are_geometric_stay_in_their_document_and_share_a_fate() -> None:
    masking = Masking(mask=MASK, vocab=VOCAB, special=SPECIAL, span=0.2)
    plain = batch(256)
    masked = masking(plain, 5)
    chosen = (masked.targets != IGNORE).numpy()
    runs = [run for hides in chosen for run in _runs(hides)]
    assert not any(start < 90 <= end - 1 for start, end in runs)
    lengths = np.array([b - a for a, b in runs])
    assert 3.0 < lengths.mean() < 4.2  # 3.8 for a geometric of 0.2 cut at 10; ends of budgets, neighbours
    fates = (masked.tokens == MASK).numpy()
    alike = [fates[i, a:b].all() or not fates[i, a:b].any() for i, hides in enumerate(chosen) for a, b in _runs(hides)]
    assert np.mean(alike) > 0.93  # but for spans that touch


def _runs(hides: np.ndarray) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], hides, [0]])))
    return zip(edges[::2], edges[1::2], strict=True)


def test_what_a_row_hides_depends_on_seed_and_row_alone() -> None:
    masking, plain = Masking(mask=MASK, vocab=VOCAB, special=SPECIAL), batch(8)
    whole = masking(plain, 3, 4)
    again = masking(plain, 3, 4)
    assert torch.equal(whole.tokens, again.tokens) and torch.equal(whole.targets, again.targets)
    assert not torch.equal(whole.targets, masking(plain, 3, 5).targets)
    half = Batch(plain.tokens[4:], plain.targets[4:], plain.positions[4:], plain.segments[4:])
    assert torch.equal(masking(half, 3, 4, first_row=4).tokens, whole.tokens[4:])


class Counted:
    """Batches by number, resumable."""

    def __init__(self, part: Callable[[Batch], Batch] = lambda b: b) -> None:
        self.number, self.part = 0, part

    def __next__(self) -> Batch:
        self.number += 1
        return self.part(batch(4, seed=self.number))

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def test_resumed_and_parallel_runs_hide_the_same() -> None:
    masking = Masking(mask=MASK, vocab=VOCAB, special=SPECIAL)
    run = MaskedBatches(Counted(), masking, seed=1)
    first = [next(run) for _ in range(5)]
    assert not torch.equal(first[0].targets != IGNORE, first[1].targets != IGNORE)
    run = MaskedBatches(Counted(), masking, seed=1)
    next(run), next(run)
    resumed = MaskedBatches(Counted(), masking, seed=1)
    resumed.load_state_dict(run.state_dict())
    for want, have in zip(first[2:], resumed, strict=False):
        assert torch.equal(want.tokens, have.tokens) and torch.equal(want.targets, have.targets)
    with pytest.raises(ValueError, match="seed 1"):
        MaskedBatches(Counted(), masking, seed=2).load_state_dict(run.state_dict())

    def lower(b: Batch) -> Batch:
        return Batch(b.tokens[2:], b.targets[2:], b.positions[2:], b.segments[2:])

    second_rank = MaskedBatches(Counted(lower), masking, seed=1, rank=1)
    assert torch.equal(next(second_rank).tokens, first[0].tokens[2:])


def test_rows_with_little_to_hide() -> None:
    plain = batch(2)
    plain.segments[0] = 0
    plain.segments[1, 2:] = 0  # one ordinary token
    for options in KINDS.values():
        masked = Masking(mask=MASK, vocab=VOCAB, special=SPECIAL, probability=0.5, **options)(plain, 1)
        assert int((masked.targets != IGNORE)[0].sum()) == 0
        assert int((masked.targets != IGNORE)[1].sum()) <= 1


def test_word_starts_and_mask_of_tokenizers(tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "[MASK]": 1, "walk": 2, "##ing": 3}
    pieces = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.add_special_tokens(["[UNK]", "[MASK]"])
    tokenizer = Tokenizer(pieces, {"mask": "[MASK]", "unk": "[UNK]"})
    assert word_starts(tokenizer).tolist() == [True, True, True, False]
    masking = Masking.of(tokenizer, whole_words=True, probability=0.2)
    assert masking.mask == 1 and masking.vocab == 4 and masking.special >= {1}
    plain = Tokenizer(Backend(models.BPE({"a": 0, "b": 1}, [])))
    with pytest.raises(ValueError, match="no mask token"):
        Masking.of(plain)
    with pytest.raises(ValueError, match="where words begin"):
        word_starts(plain)
    assert word_starts(Tokenizer(Backend(models.BPE({"Ġa": 0, "b": 1}, [])))).tolist() == [True, False]


def test_bad_values() -> None:
    for bad in ({"probability": 1.5}, {"replaced": 0.9, "random": 0.2}, {"span": 0.0}, {"longest": 0}, {"mask": 100}):
        with pytest.raises(ValueError):
            Masking(**{"mask": MASK, "vocab": VOCAB, **bad})
    with pytest.raises(ValueError, match="word_starts"):
        Masking(mask=MASK, vocab=VOCAB, word_starts=STARTS[:5])

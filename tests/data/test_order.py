"""The keyed permutation, and mixtures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from landmark.data.order import DocumentStream, Source, permute
from landmark.data.shards import Shards

MakeShards = Callable[..., Shards]


@given(st.integers(1, 700), st.lists(st.integers(0, 2**63), min_size=1, max_size=3))
def test_permute_is_a_permutation(n: int, key: list[int]) -> None:
    whole = permute(np.arange(n), n, *key)
    assert sorted(whole.tolist()) == list(range(n))
    some = np.arange(0, n, 3)
    assert permute(some, n, *key).tolist() == whole[some].tolist()


def test_permute_is_even_and_depends_on_the_key() -> None:
    n, keys = 6, 6000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permute(np.arange(n), n, key, 1)] += 1
    chi = ((counts - keys / n) ** 2 / (keys / n)).sum()
    assert chi < 60  # 25 degrees of freedom: p = 1e-4
    big = 100_003
    a, b, c = (permute(np.arange(big), big, *key) for key in ((1, 0), (1, 1), (2, 0)))
    for x, y in ((a, b), (a, c), (a, np.arange(big)), (a[1:], a[:-1])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.02
        assert (x == y).mean() < 1e-3


def test_permute_has_no_favoured_neighbours() -> None:
    steps = np.concatenate([np.diff(permute(np.arange(1000), 1000, key)) for key in range(20)])
    assert 0 < (abs(steps) == 1).sum() < 120  # 40 expected


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0], [0.05, 1.0, 2.0]])
def test_mixture_fractions_converge(weights: list[float], make_shards: MakeShards) -> None:
    rng = np.random.default_rng(0)
    sources = [
        Source(make_shards(rng.integers(5, high, 50).tolist(), tag=str(i)), weight)
        for i, (weight, high) in enumerate(zip(weights, (9, 40, 200), strict=False))
    ]
    stream = DocumentStream(sources, seed=0, shuffle=True, epochs=None)
    drawn = np.zeros(len(weights))
    for count in range(1, 3001):
        fragment = stream.take()
        drawn[fragment.source] += fragment.length
        if count in (100, 1000, 3000):
            expected = np.array(weights) / sum(weights) * drawn.sum()
            assert abs(drawn - expected).max() <= 2 * 200  # never more than about a document away
    assert np.allclose(drawn / drawn.sum(), np.array(weights) / sum(weights), atol=0.01)


def test_every_epoch_has_every_document_once_in_another_order(make_shards: MakeShards) -> None:
    shards = make_shards([3] * 40)
    stream = DocumentStream([Source(shards)], seed=3, shuffle=True, epochs=3)
    order = [fragment.document for fragment in iter(stream.take, None)]
    epochs = [order[i : i + 40] for i in (0, 40, 80)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and len(order) == 120
    plain = DocumentStream([Source(shards)], seed=3, shuffle=False, epochs=1)
    assert [fragment.document for fragment in iter(plain.take, None)] == list(range(40))


def test_bad_mixtures(make_shards: MakeShards) -> None:
    shards = make_shards([3])
    with pytest.raises(ValueError, match=r"must be positive, not \[1.0, -1\]"):
        DocumentStream([Source(shards), Source(shards, -1)], 0, True, None)
    with pytest.raises(ValueError, match="epochs of a mixture"):
        DocumentStream([Source(shards), Source(shards)], 0, True, 2)

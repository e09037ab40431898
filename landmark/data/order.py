"""The order of documents: a permutation with a key, and sources drawn by weight. Nothing here is drawn from a generator
with a hidden state, so a place in the order is a few integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from .shards import Shards

_BLOCK = 4096  # documents permuted at a time
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, SplitMix64's step


class Fragment(NamedTuple):
    """`length` tokens of a document of a source, from its token `start` on."""

    source: int
    document: int
    start: int
    length: int


def permute(indices: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Where a permutation of range(n), another for each key, sends `indices`: int64 like them, without making the rest.

    A Feistel network over the bits of n, walked until it falls below n (Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002).
    """
    if n <= 1:
        return indices.copy()
    bits = (n - 1).bit_length()
    low_bits = bits // 2
    high_bits = np.uint64(bits - low_bits)
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << int(high_bits)) - 1)
    keys = _round_keys(key)
    out = indices.astype(np.uint64)
    rest = np.arange(len(out))
    while len(rest):
        value = out[rest]
        low, high = value & low_mask, value >> np.uint64(low_bits)
        for turn, round_key in enumerate(keys):
            if turn % 2:
                low ^= _mix(high ^ round_key) & low_mask
            else:
                high ^= _mix(low ^ round_key) & high_mask
        out[rest] = value = high << np.uint64(low_bits) | low
        rest = rest[value >= n]
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of 64 depends on every other."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(key: Sequence[int], rounds: int = 8) -> list[np.uint64]:
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + np.uint64((2 * part + 1) * _GOLDEN & _MASK))
    return [_mix(state + np.uint64((turn + 1) * _GOLDEN & _MASK))[0] for turn in range(rounds)]


@dataclass(frozen=True)
class Source:
    """A corpus of a mixture; of all tokens drawn, those from it are `weight` over the sum of the weights."""

    shards: Shards
    weight: float = 1.0


class DocumentStream:
    """Documents of one or several sources, each shuffled anew in each epoch, for ever or for `epochs` epochs.

    The next document comes from the source that is furthest behind its share of the tokens. `state` is small and
    JSON-able, and says where the stream stands.
    """

    def __init__(self, sources: Sequence[Source], seed: int, shuffle: bool, epochs: int | None) -> None:
        if epochs is not None and len(sources) > 1:
            raise ValueError("epochs of a mixture end at different times; give epochs for one corpus only")
        total = sum(source.weight for source in sources)
        if not sources or any(not source.weight > 0 for source in sources):
            weights = [source.weight for source in sources]
            raise ValueError(f"the weights of a mixture must be positive, not {weights}")
        self._sources, self._seed, self._shuffle, self._epochs = list(sources), seed, shuffle, epochs
        self._shares = [source.weight / total for source in sources]
        self._drawn = [0] * len(sources)
        self._places = [0] * len(sources)  # documents taken so far, over all epochs
        self._blocks: list[tuple[int, np.ndarray]] = [(-1, np.empty(0, np.int64))] * len(sources)
        self._back: Fragment | None = None

    def take(self) -> Fragment | None:
        """What was put back, or the next whole document that is not empty; None at the end."""
        if self._back is not None:
            fragment, self._back = self._back, None
            return fragment
        while True:
            source = self._next_source()
            shards = self._sources[source].shards
            place = self._places[source]
            if self._epochs is not None and place >= self._epochs * len(shards):
                return None
            document = self._document(source, place)
            self._places[source] += 1
            length = int(shards.lengths[document])
            self._drawn[source] += length
            if length:
                return Fragment(source, document, 0, length)

    def put_back(self, fragment: Fragment) -> None:
        """The rest of a document, to be taken next."""
        assert self._back is None
        self._back = fragment

    def _next_source(self) -> int:
        if len(self._sources) == 1:
            return 0
        total = sum(self._drawn)
        behind = [share * total - drawn for share, drawn in zip(self._shares, self._drawn, strict=True)]
        if total == 0:
            behind = self._shares
        return max(range(len(behind)), key=behind.__getitem__)

    def _document(self, source: int, place: int) -> int:
        n = len(self._sources[source].shards)
        epoch, index = divmod(place, n)
        if not self._shuffle:
            return index
        block, offset = divmod(index, _BLOCK)
        number = epoch * (n // _BLOCK + 1) + block
        if self._blocks[source][0] != number:
            indices = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, n))
            self._blocks[source] = number, permute(indices, n, self._seed, source, epoch)
        return int(self._blocks[source][1][offset])

    def state(self) -> dict[str, Any]:
        return {"places": list(self._places), "drawn": list(self._drawn), "back": self._back and list(self._back)}

    def load(self, state: dict[str, Any]) -> Self:
        self._places, self._drawn = list(state["places"]), list(state["drawn"])
        self._back = Fragment(*state["back"]) if state["back"] else None
        return self

    @property
    def epoch(self) -> float:
        """Passes over the first source so far."""
        return self._places[0] / len(self._sources[0].shards)

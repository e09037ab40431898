"""Batches of packed documents: which rows, in which order, on which process; stopped and resumed exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from .order import DocumentStream, Source, permute
from .packing import PACKINGS, Packing, Row
from .shards import Shards

IGNORE = -100
"""A target that is not learned."""


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents, all tensors int64 [B, T].

    `targets` are the next tokens inside the same document, IGNORE where there is none. `positions` begin at 0 and
    `segments` count from 1 with each document of a row, or part of one that rows cut; padding is segment 0. `n_bytes`
    is how many UTF-8 bytes of text the targets stand for. `types` are token types where a model has them.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    segments: Tensor
    n_bytes: int = 0
    types: Tensor | None = None

    def to(self, device: torch.device | str) -> Self:
        """A copy on the device."""
        names = ("tokens", "targets", "positions", "segments", "types")
        tensors: dict[str, Any] = {name: getattr(self, name) for name in names}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items() if v is not None})

    @property
    def padding(self) -> float:
        """The share of the batch that is padding."""
        return int((self.segments == 0).sum()) / self.segments.numel()


class Batches:
    """An endless (or `epochs` long) iterator of batches [rows, length] over one corpus or a mixture.

    Documents come in an order given by `seed` alone and are packed into rows, `buffer` rows at a time, which are then
    shuffled among themselves, so that a batch does not hold neighbouring parts of one document. All processes plan the
    same rows and each reads its part: the union over `world` ranks is the batch of one process, in order. `rows` is
    the size of that union. With `shuffle=False` documents and rows keep the corpus's order.

    `state_dict()` is small and JSON-able; after `load_state_dict`, on any number of ranks and with any `rows`, the
    batches go on with the very next row. Raises ValueError when the corpus has fewer tokens than one batch.
    """

    def __init__(
        self,
        sources: Shards | Sequence[Source],
        rows: int,
        length: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        packing: Packing = "concatenate",
        buffer: int = 2048,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sources = [Source(sources)] if isinstance(sources, Shards) else list(sources)
        if packing not in PACKINGS:
            raise ValueError(f"packing {packing!r}: choose one of {', '.join(PACKINGS)}")
        if rows < 1 or length < 1 or buffer < 1:
            raise ValueError(f"a batch of {rows} rows of {length} tokens, {buffer} at a time: all must be positive")
        if rows % world or not 0 <= rank < world:
            raise ValueError(f"{rows} rows for rank {rank} of {world} processes: rows must be a multiple of processes")
        tokenizers = {source.shards.meta["tokenizer_fingerprint"] for source in self.sources}
        if len(tokenizers) > 1:
            raise ValueError("the corpora of a mixture have different tokenizers; tokenise them with one")
        held = sum(source.shards.tokens for source in self.sources)
        if epochs is None and held < rows * length:
            where = ", ".join(str(source.shards.folder) for source in self.sources)
            raise ValueError(
                f"{where} holds {held:,} tokens, fewer than one batch of {rows} x {length} = {rows * length:,}: "
                "give more text, fewer rows or a shorter context"
            )
        self._rows, self._length, self._rank, self._world = rows, length, rank, world
        self._settings = {
            "corpora": [[source.shards.fingerprint, source.weight] for source in self.sources],
            "seed": seed,
            "length": length,
            "packing": packing,
            "buffer": buffer,
            "shuffle": shuffle,
        }
        pack = PACKINGS[packing]
        stream = DocumentStream(self.sources, seed, shuffle, epochs)
        planned = min(buffer, max(1, held // length))  # more than an epoch would mix its repetitions
        self._plan = Plan(stream, lambda: pack(stream, length, planned), seed if shuffle else None)
        shards = [source.shards for source in self.sources]
        self._token_bytes, self._byte_scale = shards[0].token_bytes, byte_scale(shards)
        self._pad = shards[0].meta["pad_id"] or 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows = self._plan.take(self._rows)
        if not rows:
            raise StopIteration
        rows += [[]] * (-len(rows) % self._world)  # only at the end of the last epoch
        share = len(rows) // self._world
        return self._read(rows[self._rank * share : (self._rank + 1) * share])

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self._plan.state(), "settings": self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. Raises ValueError when it was taken with other data or settings."""
        check_settings(state["settings"], self._settings)
        self._plan.load(state["plan"])

    @property
    def epoch(self) -> float:
        """Passes over the (first) corpus that have been planned."""
        return self._plan.stream.epoch

    def _read(self, rows: Sequence[Row]) -> Batch:
        shape = len(rows), self._length
        fragments = np.array([fragment for row in rows for fragment in row], np.int64).reshape(-1, 4)
        source, document, start, length = fragments.T
        count = np.array([len(row) for row in rows])
        after = np.cumsum(count)  # where in the list of fragments each row ends; its padding is inserted there
        used = np.bincount(np.repeat(np.arange(len(rows)), count), length, len(rows)).astype(np.int64)
        spans = np.insert(length, after, self._length - used)
        number = np.arange(len(fragments)) - np.repeat(after - count, count) + 1
        segments = np.repeat(np.insert(number, after, 0), spans)
        real = segments > 0
        positions = np.arange(segments.size) - np.repeat(np.cumsum(spans) - spans, spans)
        positions[~real] = 0
        ids = np.empty(int(length.sum()), np.int64)
        following = np.full(len(fragments), IGNORE)  # the token after each fragment, where its document goes on
        for index, shards in enumerate(source.shards for source in self.sources):
            mine = source == index
            ids[np.repeat(mine, length)] = shards.gather(document[mine], start[mine], length[mine])
            more = mine & (start + length < shards.lengths[np.where(mine, document, 0)])
            following[more] = shards.gather(document[more], start[more] + length[more], np.ones(more.sum(), np.int64))
        tokens = np.full(segments.size, self._pad)
        tokens[real] = ids
        goal = np.empty_like(ids)
        goal[:-1] = ids[1:]
        goal[np.cumsum(length) - 1] = following
        targets = np.full(segments.size, IGNORE)
        targets[real] = goal
        n_bytes = int(self._token_bytes[goal[goal != IGNORE]].sum(dtype=np.int64))
        return Batch(
            tokens=torch.from_numpy(tokens.reshape(shape)),
            targets=torch.from_numpy(targets.reshape(shape)),
            positions=torch.from_numpy(positions.reshape(shape)),
            segments=torch.from_numpy(segments.reshape(shape)),
            n_bytes=round(n_bytes * self._byte_scale),
        )


T = TypeVar("T")


class Plan(Generic[T]):
    """Items planned from a stream a bufferful at a time by `fill`, shuffled in the buffer (unless `seed` is None) and
    given out in order. A place in it is where the stream stood before the buffer, and how much of that is used."""

    def __init__(self, stream: DocumentStream, fill: Callable[[], list[T]], seed: int | None) -> None:
        self.stream, self._fill, self._seed = stream, fill, seed
        self._before, self._number, self._used = stream.state(), 0, 0
        self._items: list[T] | None = None

    def take(self, count: int) -> list[T]:
        """The next items, fewer than `count` only at the end."""
        taken: list[T] = []
        while len(taken) < count:
            if self._items is None:
                self._items = self._planned()
            elif self._used == len(self._items):
                self._before, self._number, self._used = self.stream.state(), self._number + 1, 0
                self._items = self._planned()
            if not self._items:
                break
            part = self._items[self._used : self._used + count - len(taken)]
            self._used += len(part)
            taken += part
        return taken

    def _planned(self) -> list[T]:
        items = self._fill()
        if self._seed is None:
            return items
        order = permute(np.arange(len(items)), len(items), self._seed, _ROWS, self._number)
        return [items[index] for index in order]

    def state(self) -> dict[str, Any]:
        return {"before": self._before, "number": self._number, "used": self._used}

    def load(self, state: dict[str, Any]) -> None:
        self._before, self._number, self._used = state["before"], state["number"], state["used"]
        self.stream.load(self._before)
        self._items = None


_ROWS = 0x526F7773  # sets the keys of rows apart from those of documents


def byte_scale(shards: Sequence[Shards]) -> float:
    """Bytes of text over bytes that the tokens stand for: 1 for a byte-level tokenizer, else about 1."""
    return sum(s.bytes for s in shards) / max(1, sum(s.decoded_bytes for s in shards))


def check_settings(was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError, naming what differs."""
    if changed := [f"{key} was {was.get(key)}, is {now[key]}" for key in now if was.get(key) != now[key]]:
        raise ValueError(f"batches cannot go on where others stopped: {'; '.join(changed)}; use that run's settings")

"""Batches of parallel text for sequence-to-sequence models: pairs of like length together; resumed exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .batches import IGNORE, Plan, byte_scale, check_settings
from .order import DocumentStream, Source
from .shards import Shards


@dataclass(frozen=True)
class Seq2SeqBatch:
    """Padded pairs, a pair a row, all tensors int64: `source` and `source_segments` [B, S]; `target_in` (what the
    decoder reads, the start token first), `target_out` (what it is to say, IGNORE where nothing) and
    `target_segments` [B, T]. Segments are 1, and 0 for padding. `n_bytes` is how many UTF-8 bytes `target_out` is."""

    source: Tensor
    target_in: Tensor
    target_out: Tensor
    source_segments: Tensor
    target_segments: Tensor
    n_bytes: int = 0

    def to(self, device: torch.device | str) -> Self:
        """A copy on the device."""
        names = ("source", "target_in", "target_out", "source_segments", "target_segments")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


class Seq2SeqBatches:
    """An endless (or `epochs` long) iterator of batches of at most `tokens` target or source tokens with padding.

    `source` and `target` are the two sides of one corpus (`write_shards(..., side=...)`). Pairs come in an order given
    by `seed` alone; `buffer` pairs at a time are sorted by length and cut into batches, which are then shuffled. Pairs
    with a side longer than `longest` tokens are left out (`dropped` says how many). The decoder starts with `start`,
    by default the target tokenizer's bos, else its pad, else its eos.

    All processes plan the same batches and each reads its rows: the union over `world` ranks is the batch of one
    process, in order, but for rows of padding alone where the number of pairs is no multiple of `world`.
    """

    def __init__(
        self,
        source: Shards,
        target: Shards,
        tokens: int,
        *,
        longest: int = 512,
        start: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        buffer: int = 1 << 14,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(source) != len(target) or source.meta["corpus_fingerprint"] != target.meta["corpus_fingerprint"]:
            raise ValueError(
                f"{source.folder} and {target.folder} are not the two sides of one corpus; "
                "write both from the same pairs, with side='text' and side='target'"
            )
        if longest < 1 or tokens < longest:
            raise ValueError(f"{tokens} tokens cannot hold a pair of {longest}; raise tokens or lower longest")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} processes: ranks count from 0")
        choices = (start, target.meta["bos_id"], target.meta["pad_id"], target.meta["eos_id"])
        found = next((index for index in choices if index is not None), None)
        if found is None:
            raise ValueError("the target tokenizer has no bos, pad or eos; say with which token the decoder starts")
        self._start = found
        self._source, self._target, self._tokens = source, target, tokens
        self._rank, self._world = rank, world
        self._long = np.maximum(source.lengths, target.lengths) > longest
        self._usable = ~self._long & (source.lengths > 0) & (target.lengths > 0)
        if not self._usable.any():
            raise ValueError(f"no pair of {source.folder} has from 1 to {longest} tokens on both sides; raise longest")
        self._settings = {
            "corpora": [source.fingerprint, target.fingerprint],
            "seed": seed,
            "tokens": tokens,
            "longest": longest,
            "buffer": buffer,
            "shuffle": shuffle,
        }
        stream = DocumentStream([Source(source)], seed, shuffle, epochs)
        size = min(buffer, len(source))
        self._plan = Plan(stream, lambda: self._bucket(stream, size), seed if shuffle else None)
        self._pads = source.meta["pad_id"] or 0, target.meta["pad_id"] or 0
        self._byte_scale = byte_scale([target])

    @property
    def dropped(self) -> int:
        """Pairs that are too long."""
        return int(self._long.sum())

    def __iter__(self) -> Iterator[Seq2SeqBatch]:
        return self

    def __next__(self) -> Seq2SeqBatch:
        batch = self._plan.take(1)
        if not batch:
            raise StopIteration
        return self._read(batch[0])

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self._plan.state(), "settings": self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. Raises ValueError when it was taken with other data or settings."""
        check_settings(state["settings"], self._settings)
        self._plan.load(state["plan"])

    @property
    def epoch(self) -> float:
        """Passes over the corpus that have been planned."""
        return self._plan.stream.epoch

    def _bucket(self, stream: DocumentStream, size: int) -> list[list[int]]:
        """Batches of document numbers, from the next `size` pairs that are short enough."""
        pairs: list[int] = []
        while len(pairs) < size and (fragment := stream.take()) is not None:
            if self._usable[fragment.document]:
                pairs.append(fragment.document)
        lengths = {pair: (int(self._target.lengths[pair]), int(self._source.lengths[pair])) for pair in pairs}
        pairs.sort(key=lengths.__getitem__)
        batches: list[list[int]] = []
        widest = 0
        for pair in pairs:
            widest = max(widest, *lengths[pair])
            if not batches or widest * (len(batches[-1]) + 1) > self._tokens:
                batches.append([])
                widest = max(lengths[pair])
            batches[-1].append(pair)
        return batches

    def _read(self, pairs: Sequence[int]) -> Seq2SeqBatch:
        chosen = np.array(pairs)
        share = -(-len(chosen) // self._world)
        mine = chosen[self._rank * share : (self._rank + 1) * share]
        source, source_real = _padded(self._source, mine, share, int(self._source.lengths[chosen].max()))
        target, target_real = _padded(self._target, mine, share, int(self._target.lengths[chosen].max()))
        said = target[target_real]
        shifted = np.roll(target, 1, axis=1)
        shifted[:, 0] = self._start
        source_pad, target_pad = self._pads
        return Seq2SeqBatch(
            source=torch.from_numpy(np.where(source_real, source, source_pad)),
            target_in=torch.from_numpy(np.where(target_real, shifted, target_pad)),
            target_out=torch.from_numpy(np.where(target_real, target, IGNORE)),
            source_segments=torch.from_numpy(source_real.astype(np.int64)),
            target_segments=torch.from_numpy(target_real.astype(np.int64)),
            n_bytes=round(int(self._target.token_bytes[said].sum(dtype=np.int64)) * self._byte_scale),
        )


def _padded(shards: Shards, documents: np.ndarray, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole documents as rows [rows, width], zeros behind them, and where they are."""
    lengths = np.zeros(rows, np.int64)
    lengths[: len(documents)] = shards.lengths[documents]
    real = np.arange(width) < lengths[:, None]
    out = np.zeros((rows, width), np.int64)
    out[real] = shards.gather(documents, np.zeros_like(documents), lengths[: len(documents)])
    return out, real

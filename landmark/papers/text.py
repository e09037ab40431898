"""Real text for small experiments: the embedded corpus as bytes, so that models differ in nothing but themselves."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.corpora import open_corpus

VOCAB = 256


@cache
def corpus(held_out: bool = False) -> Tensor:
    """The bytes of the corpus' documents, end to end, each followed by a 0: the 3% that are held out, or the rest."""
    parts = open_corpus("embedded").split(0.03)
    data = b"".join(document.text.encode() + b"\0" for document in parts[held_out])
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


class ByteText:
    """An endless iterator of rows of bytes from random places of the corpus, or of `text`; batch i depends on the seed
    and i alone."""

    def __init__(
        self, rows: int, length: int, seed: int = 0, *, share: float = 1.0, text: Tensor | None = None
    ) -> None:
        self.rows, self.length, self.seed, self.made = rows, length, seed, 0
        self.text = corpus() if text is None else text
        self.end = int(len(self.text) * share) - length - 1

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.made += 1
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + self.made)
        return _rows(self.text, torch.randint(self.end, (self.rows,), generator=generator), self.length)

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]


def held_out(rows: int, length: int) -> Batch:
    """Rows at equal distances in the held-out text."""
    text = corpus(held_out=True)
    return _rows(text, torch.linspace(0, len(text) - length - 2, rows).long(), length)


def _rows(text: Tensor, starts: Tensor, length: int) -> Batch:
    rows = text[starts[:, None] + torch.arange(length + 1)].long()
    positions = torch.arange(length).expand(len(rows), -1).contiguous()
    return Batch(
        rows[:, :-1].contiguous(),
        rows[:, 1:].contiguous(),
        positions,
        torch.ones_like(positions),
        n_bytes=rows[:, 1:].numel(),
    )

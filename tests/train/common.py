"""A tiny model and an endless stream of synthetic batches, for runs of milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import landmark
from landmark.config import Config
from landmark.data.batches import IGNORE, Batch
from landmark.models.base import Model
from landmark.nn.residual import PreNorm

VOCAB, LENGTH = 61, 24

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}  # fmt: skip


def tiny(seed: int = 0, dropout: float = 0.0, **keys: Any) -> Model:
    """A Llama of some 20 thousand parameters, with dropout on its residual branches if asked."""
    torch.manual_seed(seed)
    model = landmark.build({**LLAMA, **keys})
    for module in model.modules():
        if isinstance(module, PreNorm):
            module.dropout = dropout
    return model


def batch_of(seed: int, rows: int = 4, uneven: bool = False) -> Batch:
    """Rows that count upwards by steps of their own; `uneven` leaves out targets, more in later rows."""
    g = torch.Generator().manual_seed(seed)
    start, stride = torch.randint(VOCAB, (rows, 1), generator=g), torch.randint(1, 4, (rows, 1), generator=g)
    ids = (start + stride * torch.arange(LENGTH + 1)) % VOCAB
    targets = ids[:, 1:].clone()
    if uneven:
        keep = torch.randint(1, LENGTH // (1 + torch.arange(rows)).max() + 2, (rows, 1), generator=g)
        targets[torch.arange(LENGTH) >= keep * (1 + torch.arange(rows)[:, None])] = IGNORE
    positions = torch.arange(LENGTH).expand(rows, LENGTH)
    counted = int((targets != IGNORE).sum())
    return Batch(ids[:, :-1], targets, positions, torch.ones_like(targets), n_bytes=3 * counted)


def rows_of(batch: Batch, first: int, last: int) -> Batch:
    def part(x: Tensor) -> Tensor:
        return x[first:last]

    targets = part(batch.targets)
    counted = int((targets != IGNORE).sum())
    return Batch(part(batch.tokens), targets, part(batch.positions), part(batch.segments), n_bytes=3 * counted)


class Stream:
    """Batch number n is `batch_of(n)`, of which rank r of w gets its share of the rows."""

    def __init__(self, rows: int = 4, rank: int = 0, world: int = 1, uneven: bool = False, end: int | None = None):
        self.rows, self.rank, self.world, self.uneven, self.end = rows, rank, world, uneven, end
        self.number = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.number == self.end:
            raise StopIteration
        batch = batch_of(self.number, self.rows, self.uneven)
        self.number += 1
        share = self.rows // self.world
        return rows_of(batch, self.rank * share, (self.rank + 1) * share)

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


__all__ = ["LLAMA", "Config", "Stream", "batch_of", "rows_of", "same", "tiny", "weights"]

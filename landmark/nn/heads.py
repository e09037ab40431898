"""Heads that read hidden states: a vector or labels for each sequence, labels for each token."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Config as PlainConfig
from ..ctx import Bounds
from ..ops.activation import Activation, activation
from .linear import Linear


class Pool(PlainConfig, ABC, abstract=True):
    """How a sequence's hidden states become one vector."""

    @abstractmethod
    def __call__(self, hidden: Tensor, bounds: Bounds) -> Tensor:
        """hidden [B, T, dim] -> [sequences, dim], in the order of the bounds."""


class FirstToken(Pool):
    """The first token's: BERT's [CLS]."""

    def __call__(self, hidden: Tensor, bounds: Bounds) -> Tensor:
        return _pick(hidden, [start for start, _ in bounds.sequences])


class LastToken(Pool):
    """The last token's, which alone has seen the whole text where attention is causal (Radford et al. 2018)."""

    def __call__(self, hidden: Tensor, bounds: Bounds) -> Tensor:
        return _pick(hidden, [start + length - 1 for start, length in bounds.sequences])


class MeanPool(Pool):
    """The mean over the sequence's tokens (Reimers & Gurevych 2019)."""

    def __call__(self, hidden: Tensor, bounds: Bounds) -> Tensor:
        if bounds.dense:
            return hidden.mean(1)
        index = bounds.index(hidden.device).flatten()
        lengths = torch.tensor([length for _, length in bounds.sequences], device=hidden.device)
        sums = hidden.new_zeros(len(lengths) + 1, hidden.shape[-1]).index_add(0, index + 1, hidden.flatten(0, 1))
        return sums[1:] / lengths[:, None]


def _pick(hidden: Tensor, at: list[int]) -> Tensor:
    return hidden.flatten(0, 1)[torch.tensor(at, device=hidden.device)]


class TokenHead(nn.Module):
    """W dropout(x) + b for every token: tagging; with labels "start" and "end", question answering by spans."""

    class Config(PlainConfig):
        labels: tuple[str, ...]
        dropout: float = 0.0

        def check(self) -> None:
            super().check()
            check_labels("TokenHead", self.labels)

        def build(self, dim: int) -> TokenHead:
            return TokenHead(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.linear = Linear(dim, len(cfg.labels))

    def forward(self, hidden: Tensor, bounds: Bounds | None = None) -> Tensor:
        """hidden [..., dim] -> [..., labels]."""
        out: Tensor = self.linear(F.dropout(hidden, self.cfg.dropout, self.training))
        return out


class SequenceHead(nn.Module):
    """W act(V pool(x) + c) + b for every sequence; without `act` W pool(x) + b, without `labels` the pooled vector.

    One label is a score (regression, multiple choice). `bias`: whether there is a b.
    """

    class Config(PlainConfig):
        labels: tuple[str, ...] = ()
        act: Activation | None = None
        pool: Pool = FirstToken()
        bias: bool = True
        dropout: float = 0.0
        pool_dropout: float = 0.0

        def check(self) -> None:
            super().check()
            if self.labels:
                check_labels("SequenceHead", self.labels)

        def build(self, dim: int) -> SequenceHead:
            return SequenceHead(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.dense = Linear(dim, dim) if cfg.act else None
        self.act = activation(cfg.act or "identity")
        self.linear = Linear(dim, len(cfg.labels), cfg.bias) if cfg.labels else None

    def forward(self, hidden: Tensor, bounds: Bounds) -> Tensor:
        """hidden [B, T, dim] -> [sequences, labels], or [sequences, dim]."""
        x = F.dropout(self.cfg.pool(hidden, bounds), self.cfg.pool_dropout, self.training)
        x = x if self.dense is None else self.act(self.dense(x))
        return x if self.linear is None else self.linear(F.dropout(x, self.cfg.dropout, self.training))


def check_labels(what: str, labels: tuple[str, ...]) -> None:
    if not labels:
        raise ValueError(f"{what} has no labels; name at least one")
    if len(set(labels)) != len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ValueError(f"{what} has the label {twice!r} twice")

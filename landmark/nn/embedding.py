"""From ids to hidden states: token, position and type embeddings, and the head that goes the other way."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Config as PlainConfig
from ..config import ModuleConfig, at_least
from ..ops.activation import Activation, activation
from ..ops.loss import CrossEntropy, cross_entropy, token_logprobs
from ..ops.quant.codes import Bits
from .codes import CodedLinear, check_bits, multiply, table
from .linear import Linear
from .norm import NormConfig
from .position import LearnedPositions, SinusoidalPositions


class Embedding(nn.Module):
    """norm(scale * tokens + positions + types), projected to `dim` where its own `width` differs (ALBERT)."""

    class Config(ModuleConfig):
        vocab: int
        positions: LearnedPositions.Config | SinusoidalPositions.Config | None = None
        types: int = at_least(0, default=0)  # BERT's token types
        norm: NormConfig | None = None
        scale: float = 1.0
        width: int | None = None
        dropout: float = 0.0
        bits: Bits | None = None  # the table of tokens is kept in so many a number, to be used and not trained

        def check(self) -> None:
            super().check()
            check_bits("Embedding.bits", self.bits)

        def build(self, dim: int) -> Embedding:
            return Embedding(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg, width = cfg, cfg.width or dim
        self.tokens = table(cfg.vocab, width, cfg.bits)
        self.positions = cfg.positions.build(width) if cfg.positions else None
        self.types = nn.Embedding(cfg.types, width) if cfg.types else None
        self.norm = cfg.norm.build(width) if cfg.norm else None
        self.project = Linear(width, dim) if cfg.width else None

    def forward(self, tokens: Tensor, positions: Tensor, types: Tensor | None = None) -> Tensor:
        """tokens, positions, types [B, T] (types default to 0) -> [B, T, dim]."""
        x: Tensor = self.tokens(tokens)
        if self.cfg.scale != 1.0:
            x = x * torch.tensor(self.cfg.scale, dtype=x.dtype, device=x.device)
        if self.positions is not None:
            x = x + self.positions(positions, x.dtype)
        if self.types is not None:
            x = x + (self.types.weight[0] if types is None else self.types(types))
        x = x if self.norm is None else self.norm(x)
        if self.training and self.cfg.dropout:
            x = F.dropout(x, self.cfg.dropout)
        return x if self.project is None else self.project(x)


class Transform(nn.Module):
    """norm(act(W x + b)): BERT's step before its masked-LM head."""

    class Config(PlainConfig):
        act: Activation
        norm: NormConfig

        def build(self, dim: int, width: int) -> Transform:
            return Transform(self, dim, width)

    def __init__(self, cfg: Config, dim: int, width: int) -> None:
        super().__init__()
        self.dense, self.norm, self.act = Linear(dim, width), cfg.norm.build(width), activation(cfg.act)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.act(self.dense(x)))
        return out


class Head(nn.Module):
    """Hidden states to logits over the vocabulary: softcap(scale * (W x + b)).

    A `tied` head owns no weight: the model passes its token embedding. `width` is that embedding's, where not `dim`.
    """

    class Config(PlainConfig):
        vocab: int
        tied: bool = False
        bias: bool = False
        softcap: float | None = None
        scale: float = 1.0
        width: int | None = None
        transform: Transform.Config | None = None
        bits: Bits | None = None  # a weight of its own is kept in so many a number, to be used and not trained
        round_x: bool = False  # to 8 bits, where the weight is coded

        def check(self) -> None:
            super().check()
            check_bits("Head.bits", self.bits)

        def build(self, dim: int) -> Head:
            return Head(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.cfg, width = cfg, cfg.width or dim
        self.transform = cfg.transform.build(dim, width) if cfg.transform else None
        own = None if cfg.tied else Linear(width, cfg.vocab, bias=False)
        self.linear = CodedLinear(cfg.bits, own) if own is not None and cfg.bits is not None else own
        self.bias = nn.Parameter(torch.zeros(cfg.vocab)) if cfg.bias else None

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def matrix(self, embedding: Embedding | None) -> nn.Module:
        """What holds the weight [vocab, width]."""
        if self.linear is not None:
            return self.linear
        assert embedding is not None, "a tied head needs the embedding"
        return embedding.tokens

    def weight(self, embedding: Embedding | None) -> Tensor:
        """[vocab, width]."""
        weight = self.matrix(embedding).weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor, embedding: Embedding | None = None) -> Tensor:
        """x [..., dim] -> logits [..., vocab]."""
        x = x if self.transform is None else self.transform(x)
        logits = multiply(self.matrix(embedding), x, self.bias, self.cfg.round_x)
        logits = logits if self.cfg.scale == 1.0 else logits * self.cfg.scale
        cap = self.cfg.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def loss(
        self, x: Tensor, targets: Tensor, embedding: Embedding | None = None, *, label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> CrossEntropy:  # fmt: skip
        """Cross-entropy of x [..., dim] with targets [...] (-100: none); all the logits never exist at once."""
        x = x if self.transform is None else self.transform(x)
        return cross_entropy(
            x.flatten(0, -2), self.weight(embedding), targets.flatten(), bias=self.bias, softcap=self.cfg.softcap,
            scale=self.cfg.scale, z_loss=z_loss, label_smoothing=label_smoothing,
        )  # fmt: skip

    def logprobs(self, x: Tensor, targets: Tensor, embedding: Embedding | None = None) -> Tensor:
        """log p of targets [...] (0 where -100), [...]."""
        x = x if self.transform is None else self.transform(x)
        return token_logprobs(
            x.flatten(0, -2), self.weight(embedding), targets.flatten(), bias=self.bias, softcap=self.cfg.softcap,
            scale=self.cfg.scale,
        ).view_as(targets)  # fmt: skip

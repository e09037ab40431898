"""The decoder-only language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..nn.embedding import Head
from ..ops.loss import CrossEntropy
from .backbone import Backbone
from .base import materialise


class Decoder(Backbone):
    """ids [B, T] to logits [B, T, vocab]; `hidden`, then `logits` or `loss`, are its steps for those who need them."""

    class Config(Backbone.Config):
        head: Head.Config

        def build(self) -> Decoder:
            return materialise(lambda: Decoder(self), self.init)

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.cfg: Decoder.Config = cfg
        self.head = cfg.head.build(cfg.dim)

    def forward(self, tokens: Tensor, **where: Any) -> Tensor:
        """Logits [B, T, vocab] of tokens [B, T]; keywords as in `hidden`."""
        return self.logits(self.hidden(tokens, **where))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., vocab]."""
        out: Tensor = self.head(hidden, self.embed)
        return out

    def loss(self, hidden: Tensor, targets: Tensor, **options: float) -> CrossEntropy:
        """Cross-entropy of hidden [B, T, dim] with targets [B, T] (-100: none); options as in `Head.loss`."""
        return self.head.loss(hidden, targets, self.embed, **options)

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log p of targets [B, T] (0 where -100)."""
        return self.head.logprobs(hidden, targets, self.embed)

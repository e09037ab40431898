"""The decoder-only language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ctx import Ctx
from ..nn.embedding import Head
from ..nn.mtp import DraftsConfig
from ..ops.loss import CrossEntropy
from .backbone import Backbone
from .base import materialise


class Decoder(Backbone):
    """ids [B, T] to logits [B, T, vocab]; `hidden`, then `logits` or `loss`, are its steps for those who need them."""

    class Config(Backbone.Config):
        head: Head.Config
        drafts: DraftsConfig | None = None  # modules that foretell further tokens

        def build(self) -> Decoder:
            return materialise(lambda: Decoder(self), self.init)

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.cfg: Decoder.Config = cfg
        self.head = cfg.head.build(cfg.dim)
        self.drafts = cfg.drafts.build(cfg.dim) if cfg.drafts else None

    def forward(self, tokens: Tensor, **where: Any) -> Tensor:
        """Logits [B, T, vocab] of tokens [B, T]; keywords as in `hidden`."""
        return self.logits(self.hidden(tokens, **where))

    def hidden_and_drafts(self, tokens: Tensor, ctx: Ctx) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [B, T, dim] for the next token, and those of each draft for the tokens after it."""
        assert self.drafts is not None, "this model has no drafts"
        hidden, trunk = self.hidden_and_trunk(tokens, ctx=ctx)
        return hidden, self.drafts(hidden, trunk, tokens, self.embed, ctx)

    def hidden_and_trunk(self, tokens: Tensor, **where: Any) -> tuple[Tensor, Tensor]:
        """`hidden`, and what the last layer read, [B, T, dim] each: what drafts start from."""
        read: list[Tensor] = []
        hook = self.layers[-1].register_forward_pre_hook(lambda _, given: read.append(given[0]))
        try:
            hidden = self.hidden(tokens, **where)
        finally:
            hook.remove()
        return hidden, read[0]

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

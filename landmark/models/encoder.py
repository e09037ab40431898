"""A backbone with named heads: encoders, and decoders that are to say something else than the next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import nearest
from ..ctx import Bounds, Ctx
from ..nn.disentangled import RelativePositions
from ..nn.embedding import Head
from ..nn.heads import MeanPool, Pool, SequenceHead, TokenHead
from ..nn.position import LearnedPositions
from .backbone import Backbone
from .base import Origin, init_weights, materialise
from .registry import family_of

HeadConfig = Head.Config | TokenHead.Config | SequenceHead.Config


class Encoder(Backbone):
    """Called, it gives what its `main` head reads: logits for a masked-LM head ([B, T, vocab]) or a tagging head
    ([B, T, labels]), a row for each sequence for a classification head; hidden states [B, T, dim] without a main head.

    Segments that are 0 are padding and belong to no sequence, so an attention mask can stand for `segments`; documents
    in one row are numbered from 1. Heads that read sequences give their rows in reading order.
    """

    class Config(Backbone.Config):
        heads: Mapping[str, HeadConfig]
        main: str | None = None
        relative: RelativePositions.Config | None = None  # one table for all layers (DeBERTa)

        def check(self) -> None:
            super().check()
            if self.main is not None and self.main not in self.heads:
                raise ValueError(f"Encoder.main is {self.main!r}, which is none of its heads {sorted(self.heads)}")

        def build(self) -> Encoder:
            return materialise(lambda: Encoder(self), self.init)

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.cfg: Encoder.Config = cfg
        self.relative = cfg.relative.build(cfg.dim) if cfg.relative else None
        self.heads = nn.ModuleDict({name: head.build(cfg.dim) for name, head in cfg.heads.items()})

    def forward(self, tokens: Tensor, *, types: Tensor | None = None, head: str | None = None, **where: Any) -> Tensor:
        """What a head (default: the main one) says of tokens [B, T]; keywords as in `hidden`."""
        ctx = self.context(tokens, **where)
        hidden = self.hidden(tokens, types=types, ctx=ctx)
        name = head or self.cfg.main
        return hidden if name is None else self.read(name, hidden, ctx.bounds)

    def read(self, name: str, hidden: Tensor, bounds: Bounds) -> Tensor:
        """What one head says of hidden states [B, T, dim]."""
        head = self.head(name)
        out: Tensor = head(hidden, self.embed if isinstance(head, Head) else bounds)
        return out

    def head(self, name: str) -> nn.Module:
        """A head by name. Raises ValueError with the names that there are."""
        if name not in self.heads:
            raise ValueError(f"this model has no head {name!r}{nearest(name, self.heads)}; it has {sorted(self.heads)}")
        return self.heads[name]

    def context(
        self, tokens: Tensor, *, segments: Tensor | None = None, bounds: Bounds | None = None, **where: Any
    ) -> Ctx:
        """As `Backbone.context`; segments that are 0 are padding. Raises ValueError for a text without positions."""
        if bounds is None and segments is not None:
            bounds = Bounds.of_segments(segments, padding=0)
        ctx, learned = super().context(tokens, bounds=bounds, **where), self.embed.positions
        if isinstance(learned, LearnedPositions) and ctx.bounds.longest > learned.size:
            longest = ctx.bounds.longest
            raise ValueError(f"a text of {longest} tokens does not fit the model's {learned.size} positions; cut it")
        return ctx if self.relative is None else replace(ctx, relative=self.relative(tokens.shape[1]))

    def embed_sentences(
        self, tokens: Tensor, segments: Tensor | None = None, *, pool: Pool | None = None, normalise: bool = True
    ) -> Tensor:
        """One vector a sequence of tokens [B, T]: [sequences, dim], of length 1 if `normalise`; the default pool is the
        mean (Reimers & Gurevych 2019)."""
        ctx = self.context(tokens, segments=segments)
        pooled = (pool or MeanPool())(self.hidden(tokens, ctx=ctx), ctx.bounds)
        return F.normalize(pooled, dim=-1) if normalise else pooled


def with_heads(model: Backbone, heads: Mapping[str, HeadConfig], main: str | None = None) -> Encoder:
    """The same body, its weights shared, under other heads with fresh weights: what fine-tuning begins with.

    `main` defaults to the first head.
    """
    cfg = model.cfg
    assert isinstance(cfg, Backbone.Config)
    relative = cfg.relative if isinstance(cfg, Encoder.Config) else None
    with torch.device("meta"):
        new = Encoder.Config(
            dim=cfg.dim, embed=cfg.embed, layers=cfg.layers, norm=cfg.norm, context=cfg.context, init=cfg.init,
            relative=relative, heads=heads, main=main or next(iter(heads), None),
        ).build()  # fmt: skip
    new.heads.to_empty(device=model.device).to(model.dtype)
    init_weights(new.heads, cfg.init)
    body = {name: p for name, p in model.state_dict(keep_vars=True).items() if not name.startswith(("head.", "heads."))}
    new.load_state_dict({**body, **new.heads.state_dict(prefix="heads.", keep_vars=True)}, assign=True)
    return new.train(model.training)


def for_task(model: Encoder, task: str, labels: Sequence[str] = (), *, problem_type: str | None = None) -> Encoder:
    """A published encoder with the head of another published task, e.g. "SequenceClassification" and its labels.

    The body's weights are shared, the head is fresh, and what is saved is a directory of that architecture, labels
    included. Raises ValueError for a model without a published form, and for a task that its family does not have.
    """
    if model.origin is None or not model.origin.hf.get("architectures"):
        raise ValueError("this model has no published form; give it heads of your own with `with_heads`")
    stem = model.origin.hf["architectures"][0].partition("For")[0].removesuffix("Model")
    hf = {key: value for key, value in model.origin.hf.items() if key not in ("id2label", "label2id", "num_labels")}
    hf["architectures"] = [f"{stem}For{task}"]
    if labels:
        hf["id2label"] = {str(i): label for i, label in enumerate(labels)}
        hf["label2id"] = {label: i for i, label in enumerate(labels)}
    if problem_type is not None:
        hf["problem_type"] = problem_type
    config = family_of(hf).read(hf)
    assert isinstance(config, Encoder.Config)
    new = with_heads(model, config.heads, config.main)
    new.origin = Origin(hf, model.origin.directory)
    return new

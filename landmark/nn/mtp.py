"""Multi-token prediction: modules beside a decoder that foretell the tokens after the next one.

`IndependentDrafts` (Gloeckle et al. 2024): all read what the decoder's last layer reads, each through a layer of its
own. `SequentialDrafts` (DeepSeek-V3, 2024, sec. 2.2): each reads what the one before it made, with the next token.
Both end in hidden states for the decoder's own head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, ModuleConfig
from ..ctx import Ctx
from .linear import Linear
from .norm import NormConfig
from .residual import Block


class DraftsConfig(Config, ABC, abstract=True):
    """How tokens after the next one are foretold."""

    depth: int  # how many of them

    @abstractmethod
    def build(self, dim: int) -> Drafts: ...


class Drafts(nn.Module, ABC):
    """`depth` modules; number k (from 0) foretells the token k + 2 places on."""

    depth: int

    @abstractmethod
    def forward(self, last: Tensor, trunk: Tensor, tokens: Tensor, embed: nn.Module, ctx: Ctx) -> list[Tensor]:
        """Hidden states [B, T, dim] of each module, ready for the head, for text that is all there: `last` is what the
        decoder made of `tokens` [B, T], `trunk` what its last layer read."""

    @abstractmethod
    def step(self, k: int, x: Tensor, ahead: Tensor, embed: nn.Module, ctx: Ctx, state: Any = None) -> Tensor:
        """Module k alone, on what it reads of some tokens, x [B, T, dim] -> [B, T, dim]; `ahead` [B, T] are the tokens
        k + 1 places after each. With its `state`, sequences are continued."""

    @abstractmethod
    def new_state(self, **where: Any) -> list[Any]:
        """The decoding state of each module."""


class IndependentDrafts(Drafts):
    """f_head_k(trunk), each head a layer (Gloeckle et al. 2024, sec. 2); the decoder's last layer is the first head."""

    class Config(DraftsConfig):
        layer: Mapping[str, ModuleConfig]
        norm: NormConfig | None = None

        def build(self, dim: int) -> IndependentDrafts:
            return IndependentDrafts(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.depth = cfg.depth
        self.layers = nn.ModuleList(
            Block({name: part.build(dim) for name, part in cfg.layer.items()}) for _ in range(cfg.depth)
        )
        self.norms = nn.ModuleList(cfg.norm.build(dim) for _ in range(cfg.depth) if cfg.norm is not None)

    def new_state(self, **where: Any) -> list[Any]:
        return [layer.new_state(**where) for layer in self.layers]  # type: ignore[operator]

    def step(self, k: int, x: Tensor, ahead: Tensor, embed: nn.Module, ctx: Ctx, state: Any = None) -> Tensor:
        out: Tensor = self.layers[k](x, ctx, state)
        return self.norms[k](out) if len(self.norms) else out

    def forward(self, last: Tensor, trunk: Tensor, tokens: Tensor, embed: nn.Module, ctx: Ctx) -> list[Tensor]:
        return [self.step(k, trunk, tokens, embed, ctx) for k in range(self.depth)]


class SequentialDrafts(Drafts):
    """h_k = norm(layer(project [norm(embedding of token i + k); norm(h_{k-1})])) (DeepSeek-V3, eq. 21-23)."""

    class Config(DraftsConfig):
        layer: Mapping[str, ModuleConfig]
        norm: NormConfig

        def build(self, dim: int) -> SequentialDrafts:
            return SequentialDrafts(self, dim)

    def __init__(self, cfg: Config, dim: int) -> None:
        super().__init__()
        self.depth = cfg.depth
        self.steps = nn.ModuleList(SequentialDraft(cfg, dim) for _ in range(cfg.depth))

    def new_state(self, **where: Any) -> list[Any]:
        return [step.layer.new_state(**where) for step in self.steps]  # type: ignore[operator, union-attr]

    def step(self, k: int, x: Tensor, ahead: Tensor, embed: nn.Module, ctx: Ctx, state: Any = None) -> Tensor:
        out: Tensor = self.steps[k](x, embed(ahead, ctx.positions), ctx, state)
        return out

    def forward(self, last: Tensor, trunk: Tensor, tokens: Tensor, embed: nn.Module, ctx: Ctx) -> list[Tensor]:
        hidden, made = last, []
        for k in range(self.depth):
            ahead = torch.cat([tokens[:, k + 1 :], tokens[:, : k + 1]], 1)  # what comes round is nobody's target
            hidden = self.step(k, hidden, ahead, embed, ctx)
            made.append(hidden)
        return made


class SequentialDraft(nn.Module):
    """One module of `SequentialDrafts`."""

    def __init__(self, cfg: SequentialDrafts.Config, dim: int) -> None:
        super().__init__()
        self.embed_norm, self.hidden_norm = cfg.norm.build(dim), cfg.norm.build(dim)
        self.project = Linear(2 * dim, dim, bias=False)
        self.layer = Block({name: part.build(dim) for name, part in cfg.layer.items()})
        self.norm = cfg.norm.build(dim)

    def forward(self, hidden: Tensor, embedded: Tensor, ctx: Ctx, state: Any = None) -> Tensor:
        both = torch.cat([self.embed_norm(embedded), self.hidden_norm(hidden)], -1)
        out: Tensor = self.norm(self.layer(self.project(both), ctx, state))
        return out

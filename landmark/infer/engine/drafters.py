"""Which drafter an engine has, and what memory is left beside it."""

from __future__ import annotations

from typing import Literal

from ...models.decoder import Decoder
from ...models.inspect import state_bytes
from .drafts import Drafter, LookupDrafts
from .follower import ModelDrafts
from .own import OwnDrafts

Draft = Decoder | Literal["lookup", "own"]


def drafter_of(draft: Draft | None, model: Decoder, memory: int, **sizes: int | bool) -> tuple[Drafter | None, int]:
    """The drafter, and what it leaves of `memory` bytes: a model that drafts takes as large a share of it as its state
    of a text is of both models'. `sizes` are those of its store. Raises ValueError for what cannot draft."""
    if draft is None:
        return None, memory
    if isinstance(draft, Decoder):
        own, its = (state_bytes(one, one.dtype, 1024)[0] for one in (draft, model))
        share = memory * own // (own + its)
        return ModelDrafts(draft, model, memory=share, **sizes), memory - share
    if draft == "own":
        return OwnDrafts(model), memory
    if draft == "lookup":
        return LookupDrafts(), memory
    raise ValueError(f"drafter is {draft!r}; give 'lookup', 'own', a decoder with the same vocabulary, or None")

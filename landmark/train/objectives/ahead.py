"""The next tokens, several of them at once, by a decoder with drafts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...models.base import Model
from ...models.decoder import Decoder
from ...nn.mtp import IndependentDrafts, SequentialDrafts
from ...objectives import mtp
from .base import ObjectiveConfig
from .causal import SMALL, Packed

if TYPE_CHECKING:
    from ..prepare import Prepared


class MultiToken(ObjectiveConfig):
    """Next tokens of packed documents, and those after them; see `objectives.mtp.MultiToken`.

    A decoder without drafts gets `depth` of them, each of a layer like its last one: "sequential" as DeepSeek-V3's, or
    "independent" as Gloeckle et al.'s.
    """

    writes: ClassVar[bool] = True

    weight: float = 0.3
    z_loss: float = 0.0
    depth: int = 1
    drafts: Literal["sequential", "independent"] = "sequential"

    def check(self) -> None:
        super().check()
        self.within(0.0, 1e3, weight=self.weight, z_loss=self.z_loss)
        if self.drafts not in ("sequential", "independent"):
            raise ValueError(f"objective.drafts is {self.drafts!r}; choose sequential or independent")

    def build(self) -> mtp.MultiToken:
        return mtp.MultiToken(self.weight, self.z_loss)

    def pipeline(self, prepared: Prepared) -> Ahead:
        return Ahead(self, prepared)

    def small(self) -> Mapping[str, Any]:
        return SMALL


class Ahead(Packed[MultiToken]):
    def adapt(self, model: Model) -> Model:
        model = super().adapt(model)
        assert isinstance(model, Decoder)
        return model if model.drafts is not None else with_drafts(model, self.objective)


def with_drafts(model: Decoder, objective: MultiToken) -> Decoder:
    """The decoder with new drafts; all else it shares with the old one."""
    layer, norm = model.cfg.layers[-1], model.cfg.norm
    if not isinstance(layer, Mapping) or norm is None:
        raise ValueError("drafts are made like the last layer and norm, and this model's are not of the usual kind")
    kind = SequentialDrafts if objective.drafts == "sequential" else IndependentDrafts
    drafts = kind.Config(depth=objective.depth, layer=layer, norm=norm)
    new = dataclasses.replace(model.cfg, drafts=drafts).build()
    new.load_state_dict({**new.state_dict(), **model.state_dict()}, assign=True)
    new.requires_grad_(True)
    new.origin = model.origin
    return new

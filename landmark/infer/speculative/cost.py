"""What a proposal costs, relative to a call of the model; modelled, so that it does not depend on the clock."""

from __future__ import annotations

from ...models.decoder import Decoder
from ...models.inspect import depth, forward_flops

LAYER = 1e6  # FLOPs in whose time a layer of a model that is small is called
CALL = 1e7  # and what comes before and after all of them: batches, draws


def draft_cost(draft: Decoder, model: Decoder) -> float:
    """Of a smaller model that drafts: a call of it."""
    own, its = (forward_flops(one, 512) + CALL + LAYER * depth(one) for one in (draft, model))
    return own / its


def own_cost(model: Decoder) -> float:
    """Of a model's own modules for further tokens: a layer and the head."""
    whole, head = forward_flops(model, 512), 2 * model.cfg.dim * model.cfg.head.vocab
    return ((whole - head) / len(model.layers) + head) / whole

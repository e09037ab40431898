"""Which layers look through a window: `layer_types` of newer config.json files, a rule of the family in older ones."""

from __future__ import annotations

from collections.abc import Callable

from ..config import nearest
from .registry import Keys

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(keys: Keys, window: int | None, slides: Callable[[int], bool]) -> list[str]:
    """FULL or SLIDING for every layer; `slides(i)` decides for layer i where the file does not list them."""
    depth = keys["num_hidden_layers"]
    types: list[str] = keys.get("layer_types") or [SLIDING if slides(i) else FULL for i in range(depth)]
    if len(types) != depth:
        raise ValueError(f"config.json: layer_types names {len(types)} layers, but num_hidden_layers is {depth}")
    for kind in types:
        if kind not in (FULL, SLIDING):
            near = nearest(kind, (FULL, SLIDING))
            raise ValueError(f"config.json: the layer type {kind!r} is not supported for {keys.name}{near}")
    if window is None and SLIDING in types:
        raise ValueError(f"config.json: layer {types.index(SLIDING)} is to slide, but sliding_window gives no width")
    return types

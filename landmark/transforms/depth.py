"""Depth up-scaling (SOLAR, Kim et al. 2023): a deeper model out of two copies of a trained one."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import flatten, to_dict
from ..models.backbone import Backbone
from ..models.base import Model
from ..models.layer_keys import FULL, SLIDING
from ..nn.residual import Layer
from .rebuild import rebuilt

DEPTH = ("num_hidden_layers", "n_layer", "num_layers")  # how config.json may call it


def upscale_depth(model: Model, drop: int) -> Model:
    """A new model of 2 * (layers - drop) layers: the first copy without its last `drop` layers, then the second without
    its first `drop` (sec. 2.1; SOLAR 10.7B: 32 layers, drop 8 -> 48). It goes on to be trained. Raises ValueError for a
    model that is no single stack of layers, and for a `drop` that leaves nothing or adds nothing."""
    if not isinstance(model, Backbone):
        raise ValueError(f"a {type(model).__name__} is no single stack of layers; give a decoder or an encoder")
    depth = len(model.cfg.layers)
    if not 0 <= drop < depth or 2 * (depth - drop) <= depth:
        raise ValueError(
            f"dropping {drop} of {depth} layers twice makes no deeper model; choose 0 to {(depth - 1) // 2}"
        )
    kept = [*range(depth - drop), *range(drop, depth)]
    old = model.state_dict()
    weights = {name: tensor for name, tensor in old.items() if not name.startswith("layers.")}
    for new_index, index in enumerate(kept):
        prefix = f"layers.{index}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in old.items() if name.startswith(prefix)}
        weights |= {f"layers.{new_index}.{name}": tensor for name, tensor in layer.items()}
    layers = tuple(model.cfg.layers[index] for index in kept)
    said: dict[str, Any] = {}
    if model.origin is not None:
        said = {key: len(kept) for key in DEPTH if key in model.origin.hf}
    listed = {**said, "layer_types": [SLIDING if _slides(layer) else FULL for layer in layers]}
    return rebuilt(model, dataclasses.replace(model.cfg, layers=layers), weights, said, listed)


def _slides(layer: Layer) -> bool:
    """Does a layer look through a window?"""
    return any(path.endswith(".window") and width for path, width in flatten(to_dict(layer)).items())

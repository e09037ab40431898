"""A longer context for a trained rotary model, by one of the published ways, to be used or to be trained further.

Position interpolation (2306.15595), NTK-aware, dynamic NTK, an adjusted base (ABF), YaRN (2309.00071), Llama 3.1's way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ..config import Config, nearest
from ..models.base import Model
from ..models.inspect import longest_text
from ..nn.rope import Rope
from ..nn.rope_scaling import DynamicNTKRope, LinearRope, Llama3Rope, NTKRope, RopeScaling, YaRN
from .rebuild import rebuilt, replace_configs

WAYS: dict[str, Callable[[float, int], RopeScaling]] = {
    "linear": lambda factor, original: LinearRope(factor=factor),
    "ntk": lambda factor, original: NTKRope(factor=factor),
    "dynamic": lambda factor, original: DynamicNTKRope(factor=factor, original=original),
    "yarn": lambda factor, original: YaRN(factor=factor, original=original),
    "llama3": lambda factor, original: Llama3Rope(factor=factor, low=1.0, high=4.0, original=original),
}


def extend_context(model: Model, way: str, factor: float = 1.0, *, theta: float | None = None) -> Model:
    """A new model with the same weights whose positions are stretched `factor` times, and whose context grows as much.

    `way` is one of WAYS, or "abf": the rotary base becomes `theta` and nothing else changes but the context. A model
    that is stretched already gets the new way in place of its old one, over the context that it now has. Raises
    ValueError for an unknown way, a factor below 1, or a model without rotary positions or a known context.
    """
    if way != "abf" and way not in WAYS:
        raise ValueError(f"unknown way {way!r}{nearest(way, [*WAYS, 'abf'])}; choose one of {', '.join(WAYS)}, abf")
    if not 1 <= factor < math.inf:
        raise ValueError(f"a factor of {factor} does not make the context longer; give one above 1")
    if (way == "abf") != (theta is not None):
        raise ValueError("theta goes with abf, and abf needs it")
    original = longest_text(model)
    if original is None:
        raise ValueError("this model does not say which context it was trained for; set it in its config first")
    thetas: set[float] = set()

    def stretch(config: Config) -> Config:
        if isinstance(config, Rope.Config):
            thetas.add(theta or config.theta)
            scaling = None if way == "abf" else WAYS[way](factor, original)
            return dataclasses.replace(config, theta=theta or config.theta, scaling=scaling)
        return config

    config = replace_configs(model.cfg, stretch)
    if not thetas:
        raise ValueError("this model has no rotary positions to stretch")
    context = round(original * factor)
    config = dataclasses.replace(config, context=context)
    return rebuilt(model, config, model.state_dict(), *published(way, factor, original, context, thetas))


def published(way: str, factor: float, original: int, context: int, thetas: set[float]) -> list[dict[str, Any]]:
    """What config.json says of it: `rope_parameters`, or the older pair of keys."""
    if len(thetas) > 1:  # layers of several kinds: no one key says it
        return []
    values: dict[str, Any] = {"rope_type": "default" if way == "abf" else way}
    if way != "abf":
        values |= {"factor": factor, "original_max_position_embeddings": original}
    if way == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    (theta,) = thetas
    common = {"max_position_embeddings": context, "rope_theta": theta}
    new = common | {"rope_parameters": values | {"rope_theta": theta}, "rope_scaling": None}
    return [new, common | {"rope_scaling": values}]

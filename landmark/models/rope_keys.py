"""Rotary positions as config.json writes them: `rope_parameters` (new), or `rope_theta` with `rope_scaling` (old)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import nearest
from ..nn.rope import Rope
from ..nn.rope_scaling import DynamicNTKRope, LinearRope, Llama3Rope, LongRoPE, NTKRope, RopeScaling, YaRN
from .registry import Keys


def rope(
    keys: Keys, head_dim: int, *, theta: float = 10_000.0, fraction: float = 1.0, interleaved: bool = False,
    layer_type: str | None = None,
) -> Rope.Config:  # fmt: skip
    """The rotary config of a family; `theta` and `fraction` are the family's defaults.

    `layer_type` picks one of several sets, where `rope_parameters` holds one a layer type (Gemma 3).
    """
    old, new = keys.get("rope_scaling", {}), keys.get("rope_parameters", {})
    if layer_type is not None and isinstance(new.get(layer_type), Mapping):
        new = new[layer_type]
    values = {**old, **new}
    theta = float(values.get("rope_theta") or keys.get("rope_theta", theta))
    fraction = float(values.get("partial_rotary_factor") or keys.get("partial_rotary_factor", fraction))
    dim = int(head_dim * fraction)
    return Rope.Config(
        theta=theta, dim=None if dim == head_dim else dim, interleaved=interleaved, scaling=scaling(values, keys)
    )


KNOWN = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor", "low_freq_factor",
    "high_freq_factor", "partial_rotary_factor",
}  # fmt: skip


def scaling(values: Mapping[str, Any], keys: Keys) -> RopeScaling | None:
    for key in values.keys() - KNOWN:
        near = nearest(key, KNOWN)
        raise ValueError(f"config.json: the rope parameter {key!r} = {values[key]!r} is not understood{near}")
    kind = values.get("rope_type") or values.get("type") or "default"
    context, outer = keys.get("max_position_embeddings"), keys.get("original_max_position_embeddings")
    original = outer or values.get("original_max_position_embeddings") or context
    values = {**values, "original_max_position_embeddings": original}

    def need(key: str) -> Any:
        if values.get(key) is None:
            raise ValueError(f"config.json: rotary positions of type {kind!r} need the parameter {key!r}")
        return values[key]

    def number(key: str) -> float:
        if not isinstance(value := need(key), int | float):
            raise ValueError(f"config.json: the rope parameter {key} is {value!r}; it must be a number")
        return float(value)

    match kind:
        case "default":
            return None
        case "linear":
            return LinearRope(factor=number("factor"))
        case "ntk":
            return NTKRope(factor=number("factor"))
        case "dynamic":
            return DynamicNTKRope(factor=number("factor"), original=need("original_max_position_embeddings"))
        case "yarn":
            return YaRN(
                factor=number("factor"),
                original=need("original_max_position_embeddings"),
                beta_fast=float(values.get("beta_fast") or 32),
                beta_slow=float(values.get("beta_slow") or 1),
                attention=values.get("attention_factor"),
                mscale=values.get("mscale"),
                mscale_all=values.get("mscale_all_dim"),
                truncate=values.get("truncate", True),
            )
        case "longrope" | "su":
            return LongRoPE(
                short=tuple(map(float, need("short_factor"))),
                long=tuple(map(float, need("long_factor"))),
                original=need("original_max_position_embeddings"),
                factor=float(values.get("factor") or (context / original if context else need("factor"))),
                attention=values.get("attention_factor"),
            )
        case "llama3":
            return Llama3Rope(
                factor=number("factor"),
                low=number("low_freq_factor"),
                high=number("high_freq_factor"),
                original=need("original_max_position_embeddings"),
            )
    kinds = ("default", "linear", "ntk", "dynamic", "yarn", "longrope", "llama3")
    raise ValueError(f"config.json: unknown rope type {kind!r}{nearest(kind, kinds)}")

"""`quantization_config` of config.json: what stands for the linear maps of a family's layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig, nearest
from ..nn.bitlinear import BitLinear, PackedBitLinear
from ..nn.linear import LinearConfig
from ..nn.norm import RMSNorm
from .backbone import Backbone

METHODS = ("bitnet",)
BITNET = {  # its keys, and what a file without them means
    "quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline", "use_rms_norm": False,
    "rms_norm_eps": 1e-6, "modules_to_not_convert": None,
}  # fmt: skip
CHOICES = {"linear_class": ("bitlinear", "autobitlinear"), "quantization_mode": ("offline", "online")}
OUTSIDE = {"lm_head", "embed_tokens", "model.embed_tokens"}  # what is no linear map of a layer


def quantised(config: ModelConfig, said: Mapping[str, Any]) -> ModelConfig:
    """`config` with the linear maps that a `quantization_config` names. Raises ValueError for what is not known."""
    method = said.get("quant_method")
    if method not in METHODS:
        raise ValueError(
            f"config.json: quantization_config.quant_method = {method!r} is not supported"
            f"{nearest(str(method), METHODS)}; only {', '.join(METHODS)}"
        )
    if not isinstance(config, Backbone.Config):
        raise ValueError("config.json: quantization_config is understood for a single stack of layers only")
    return dataclasses.replace(config, linear=bitnet(said))


def bitnet(said: Mapping[str, Any]) -> LinearConfig:
    """The linear maps of BitNet b1.58 as transformers' files describe them."""
    for key in said.keys() - BITNET.keys():
        if said[key] not in (None, False):
            raise ValueError(f"config.json: quantization_config.{key} is not understood{nearest(key, BITNET)}")
    values = {key: said.get(key, default) for key, default in BITNET.items()}
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            near = nearest(str(values[key]), choices)
            raise ValueError(
                f"config.json: quantization_config.{key} is {values[key]!r}{near}; only {', '.join(choices)}"
            )
    kept = set(values["modules_to_not_convert"] or ()) - OUTSIDE
    if kept:
        raise ValueError(
            f"config.json: quantization_config.modules_to_not_convert names {min(kept)!r}, which is converted here"
        )
    norm = RMSNorm.Config(eps=values["rms_norm_eps"]) if values["use_rms_norm"] else None
    if values["quantization_mode"] == "offline":
        return PackedBitLinear.Config(rms_norm=norm, reciprocal=values["linear_class"] == "bitlinear")
    if values["linear_class"] == "bitlinear":
        raise ValueError("config.json: quantization_config: 'bitlinear' is never 'online'; that is 'autobitlinear'")
    return BitLinear.Config(rms_norm=norm)


def published(linear: LinearConfig) -> dict[str, Any]:
    """The `quantization_config` that `bitnet` reads as `linear`, if any does."""
    assert isinstance(linear, BitLinear.Config | PackedBitLinear.Config)
    packed = isinstance(linear, PackedBitLinear.Config)
    said: dict[str, Any] = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear"
        if isinstance(linear, PackedBitLinear.Config) and linear.reciprocal
        else "autobitlinear",
        "quantization_mode": "offline" if packed else "online",
    }
    if linear.rms_norm is not None:
        said |= {"use_rms_norm": True, "rms_norm_eps": linear.rms_norm.eps}
    return said

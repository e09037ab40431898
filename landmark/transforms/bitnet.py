"""BitNet b1.58 (Ma et al. 2024) out of any model: linear maps of the layers become ternary, embedding and head stay."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..models.backbone import Backbone
from ..models.base import Model
from ..models.quantised import published
from ..nn.bitlinear import BitExperts, BitLinear, PackedBitLinear, packed_ternary
from ..nn.linear import KEPT, LinearConfig
from .rebuild import rebuilt, replace_configs

NEW = BitLinear.Config()


def bitnet(model: Model, linear: BitLinear.Config = NEW) -> Model:
    """A new model whose linear maps round their weight and their input, with the same weights in full precision, to be
    trained. Raises ValueError for a model whose linear maps are no plain ones, and for one without any."""
    weights: dict[str, Tensor] = dict(model.state_dict())

    def change(config: Config) -> Config:
        if not isinstance(config, Backbone.Config):
            return config
        if config.linear not in (None, linear):
            raise ValueError(f"this model's linear maps are {config.linear.type_name} already")
        return dataclasses.replace(config, linear=linear)

    config = replace_configs(model.cfg, change)
    with torch.device("meta"):
        made = {name: m for name, m in config.build().named_modules() if isinstance(m, BitLinear | BitExperts)}
    if not made:
        raise ValueError("this model has no linear maps in its layers")
    for name, module in made.items():
        if module.rms_norm is not None:
            weights[f"{name}.rms_norm.weight"] = weights[f"{name}.weight"].new_ones(module.in_features)
    return rebuilt(model, config, weights, *_said(linear))


@torch.no_grad()
def pack_ternary(model: Model) -> Model:
    """A new model of the rounded weights alone, two bits each: the same numbers, for use and no more for training.

    Raises ValueError for a model that has no `BitLinear`.
    """
    trained = {name: m for name, m in model.named_modules() if isinstance(m, BitLinear | BitExperts)}
    if not trained:
        raise ValueError("this model has no ternary linear maps to pack; `landmark transform --bitnet` makes them")
    weights: dict[str, Tensor] = dict(model.state_dict())
    for name, module in trained.items():
        weights[f"{name}.weight"], weights[f"{name}.weight_scale"] = packed_ternary(module.weight)
    found: list[LinearConfig] = []

    def change(config: Config) -> Config:
        if not isinstance(config, Backbone.Config) or not isinstance(config.linear, BitLinear.Config):
            return config
        found.append(PackedBitLinear.Config(rms_norm=config.linear.rms_norm, skip=config.linear.skip))
        return dataclasses.replace(config, linear=found[-1])

    return rebuilt(model, replace_configs(model.cfg, change), weights, *_said(found[0]))


def _said(linear: LinearConfig) -> list[dict[str, Any]]:
    """What config.json says of it; nothing says that some maps are skipped."""
    return [] if linear.skip != KEPT else [{"quantization_config": published(linear)}]

"""What transforms of a built model's shape share: another config, the weights that go with it, a new model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import Config, ModelConfig, fields
from ..models.base import Model, Origin
from ..models.registry import family_of

C = TypeVar("C", bound=ModelConfig)


def replace_configs(value: Any, change: Callable[[Config], Config]) -> Any:
    """The tree of configs with `change` applied to every config in it, innermost first."""
    if isinstance(value, Config):
        inner = {f.name: replace_configs(getattr(value, f.name), change) for f in fields(value)}
        return change(dataclasses.replace(value, **inner))  # type: ignore[type-var]
    if isinstance(value, Mapping):
        return {key: replace_configs(item, change) for key, item in value.items()}
    return tuple(replace_configs(item, change) for item in value) if isinstance(value, tuple) else value


def rebuilt(model: Model, config: ModelConfig, weights: Mapping[str, Tensor], *said: Mapping[str, Any]) -> Model:
    """A new model of `config` that owns a copy of `weights`.

    `said` are keys of config.json that may say the difference: the first that the family reads as `config` are those of
    the new model's published form, and without any it is saved in our own. Its tokenizer is the old model's.
    """
    with torch.device("meta"):
        new = config.build()
    assert isinstance(new, Model)
    new.load_state_dict({name: tensor.detach().clone() for name, tensor in weights.items()}, assign=True)
    new.requires_grad_(True).train(model.training)
    if model.origin is not None:
        forms = [{**model.origin.hf, **keys} for keys in said]
        new.origin = Origin(next((hf for hf in forms if reads_as(hf, config)), {}), model.origin.directory)
    return new


def reads_as(hf: Mapping[str, Any], config: ModelConfig) -> bool:
    """Does a config.json describe exactly this config?"""
    try:
        return family_of(hf).read(hf) == config
    except ValueError:  # the family cannot say it
        return False

"""Published sizes of the state space models: all parameters, those that a token passes, and transformers' tensors."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from landmark.models.inspect import figures
from landmark.models.registry import Keys, sizes
from landmark.weights.rules import unload

from .test_sizes import meta

PARAMETERS = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
    "codestral-mamba-7b": 7_285_403_648,
    "jamba-v0.1": 51_570_323_328,
    "jamba-1.5-mini": 51_570_323_328,
    "jamba-1.5-large": 398_555_145_696,
}
ACTIVE = {"jamba-v0.1": 12e9, "jamba-1.5-mini": 12e9, "jamba-1.5-large": 94e9}  # as the papers give them


def shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def test_every_size_is_here() -> None:
    names = {"mamba", "mamba2", "jamba"}
    assert {name for name, (family, _) in sizes().items() if family.name in names} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_beside_transformers(name: str) -> None:
    """Its count is ours and the published one, and what it writes of the size reads as the same model."""
    family, ours, hf = meta(name)
    config = AutoConfig.for_model(hf["model_type"], **{k: v for k, v in hf.items() if k != "model_type"})
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == PARAMETERS[name]
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    have = unload(family.rules(Keys(hf)), ours.state_dict())
    if hf["model_type"] != "jamba":  # on disk it has one tensor an expert
        assert shapes(have) == shapes({k: t for k, t in theirs.state_dict().items() if k not in tied})
    assert family.read({**config.to_diff_dict(), "architectures": hf["architectures"]}) == ours.cfg


@pytest.mark.parametrize("name", ACTIVE)
def test_active(name: str) -> None:
    assert round(figures(meta(name)[1], context=100).active / 1e9) == ACTIVE[name] / 1e9

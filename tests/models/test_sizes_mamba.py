"""Published sizes of the state space models: all parameters, those that a token passes, and transformers' tensors."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from landmark.models.inspect import figures
from landmark.models.registry import Keys, published, sizes
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
HUB = {  # what the files on the hub say besides
    "mamba-130m": {
        "conv_kernel": 4, "d_inner": 1536, "d_model": 768, "expand": 2, "fused_add_norm": True, "hidden_act": "silu",
        "intermediate_size": 1536, "layer_norm_epsilon": 1e-5, "n_layer": 24, "pad_vocab_size_multiple": 8,
        "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 16,
        "time_step_floor": 1e-4, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
        "time_step_rank": 48, "time_step_scale": 1.0, "use_bias": False, "use_conv_bias": True,
    },
    "codestral-mamba-7b": {
        "chunk_size": 256, "conv_kernel": 4, "expand": 2, "intermediate_size": 8192, "layer_norm_epsilon": 1e-5,
        "norm_before_gate": True, "residual_in_fp32": True, "rms_norm": True, "time_step_floor": 1e-4,
        "time_step_limit": [0.0, float("inf")], "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256,
        "use_bias": False, "use_conv_bias": True,
    },
    "jamba-v0.1": {
        "attention_dropout": 0.0, "attn_layer_offset": 4, "attn_layer_period": 8, "expert_layer_offset": 1,
        "expert_layer_period": 2, "calc_logits_for_entire_prompt": False, "mamba_conv_bias": True, "mamba_d_conv": 4,
        "mamba_d_state": 16, "mamba_dt_rank": 256, "mamba_expand": 2, "mamba_inner_layernorms": True,
        "mamba_proj_bias": False, "n_ctx": 262144, "num_experts": 16, "num_experts_per_tok": 2, "rms_norm_eps": 1e-6,
        "output_router_logits": False, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "use_mamba_kernels": True,
    },
}  # fmt: skip


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


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_files_read_as_the_published_size(name: str) -> None:
    family, hf = published(name)
    assert family.read({**hf, **HUB[name]}) == family.read(hf)

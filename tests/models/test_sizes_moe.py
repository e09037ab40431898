"""Published sizes of the families with experts: all parameters and those that a token passes, and transformers' tensors
where it knows the family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from landmark.models.inspect import figures
from landmark.models.registry import Keys, families, sizes

from .test_sizes import meta

PARAMETERS = {  # as the papers and model cards give them: all, active
    "mixtral-8x7b": ("46.7e9", "12.9e9"),
    "mixtral-8x22b": ("141e9", "39e9"),
    "qwen3-30b-a3b": ("30.5e9", "3.35e9"),  # the card's 3.3 is cut off, not rounded
    "qwen3-235b-a22b": ("235e9", "22e9"),
    "glam-64b-64e": ("1.2e12", "96.6e9"),
    "llama4-scout": ("108e9", "17e9"),  # 109 with its eyes
    "llama4-maverick": ("4.0e11", "17e9"),
}
EXACT = {
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "llama4-scout": 107_769_861_120,
    "llama4-maverick": 400_711_848_960,
}


CACHE = {"mixtral-8x7b": 131_072, "llama4-scout": 196_608}  # bytes per token in bfloat16, within the first chunk
HUB = {  # what the files on the hub say besides
    "mixtral-8x7b": {
        "hidden_act": "silu", "attention_dropout": 0.0, "output_router_logits": False, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "transformers_version": "4.36.0.dev0", "use_cache": True, "torch_dtype": "bfloat16",
    },
    "qwen3-30b-a3b": {
        "attention_bias": False, "max_window_layers": 48, "mlp_only_layers": [], "output_router_logits": False,
        "rope_scaling": None, "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False,
    },
    "llama4-scout": {
        "attn_scale": 0.1, "attn_temperature_tuning": True, "floor_scale": 8192, "for_llm_compressor": False,
        "cache_implementation": "hybrid", "interleave_moe_layer_step": 1, "moe_layers": list(range(48)),
        "no_rope_layers": [1, 1, 1, 0] * 12, "router_jitter_noise": 0.0, "use_qk_norm": True,
    },
}  # fmt: skip


def rounded(value: int, like: str) -> str:
    digits, exponent = like.split("e")
    places = len(digits.partition(".")[2])
    return f"{value / 10 ** int(exponent):.{places}f}e{exponent}"


def test_every_size_is_here() -> None:
    names = {"mixtral", "qwen3_moe", "glam", "llama4_text"}
    assert {name for name, (family, _) in sizes().items() if family.name in names} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    made = figures(meta(name)[1], context=100)
    have = tuple(rounded(n, like) for n, like in zip((made.parameters, made.active), PARAMETERS[name], strict=True))
    assert have == PARAMETERS[name]


@pytest.mark.parametrize("name", EXACT)
def test_beside_transformers(name: str) -> None:
    """Its count is ours and the published one, and what it writes of the size reads as the same model."""
    family, ours, hf = meta(name)
    config = AutoConfig.for_model(hf["model_type"], **{k: v for k, v in hf.items() if k != "model_type"})
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == EXACT[name]
    assert family.read({**config.to_diff_dict(), "architectures": hf["architectures"]}) == ours.cfg
    assert family is families()[hf["architectures"][0]] and family.rules(Keys(hf))


@pytest.mark.parametrize("name", CACHE)
def test_cache_bytes(name: str) -> None:
    assert figures(meta(name)[1], context=100).cache_per_token == CACHE[name]


def test_chunks_bound_the_cache() -> None:
    """Beyond a chunk, only Scout's twelve layers that see everything keep more."""
    assert figures(meta("llama4-scout")[1], context=8192).cache_growth == 196_608 // 4


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_files_read_as_the_published_size(name: str) -> None:
    family, _, hf = meta(name)
    assert family.read({**hf, **HUB[name]}) == family.read(hf)

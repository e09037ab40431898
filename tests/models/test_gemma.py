from __future__ import annotations

from pathlib import Path

import pytest
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
)

import landmark
from landmark.models.gemma import geglu
from landmark.models.registry import Keys

from .families import check_decoder
from .layouts import old_rope, without

BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=64, head_dim=16)
GEMMA = {
    "plain": {},
    "mqa": {"num_key_value_heads": 1, "head_dim": 22},
    "untied and biased": {"tie_word_embeddings": False, "attention_bias": True},
}
SMALL = BASE | dict(sliding_window=6, query_pre_attn_scalar=9)
GEMMA2 = {
    "plain": {},
    "odd heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 22},
    "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "tight caps": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5},
    "untied and biased": {"tie_word_embeddings": False, "attention_bias": True},
    "listed layers": {"layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"]},
}
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA3 = {
    "plain": {"num_hidden_layers": 7},
    "odd heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 22, "num_hidden_layers": 6},
    "stretched": {"num_hidden_layers": 6, "rope_parameters": LINEAR},
    "capped": {"final_logit_softcapping": 1.5, "num_hidden_layers": 6},
    "untied and biased": {"tie_word_embeddings": False, "attention_bias": True},
    "listed layers": {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
}


def old_gemma3(hf: dict) -> dict:
    """The first Gemma 3 files: two bases, one stretch, and a pattern."""
    turns = hf.pop("rope_parameters")
    full, local = turns["full_attention"], turns["sliding_attention"]
    del hf["layer_types"]
    hf |= {"rope_theta": full.pop("rope_theta"), "rope_local_base_freq": local["rope_theta"]}
    return hf | {"sliding_window_pattern": 6, "rope_scaling": full if full["rope_type"] != "default" else None}


@pytest.mark.parametrize("name", GEMMA)
@pytest.mark.parametrize("old", [False, True])
def test_gemma(name: str, old: bool, tmp_path: Path) -> None:
    config = GemmaConfig(**{**BASE, **GEMMA[name]})
    check_decoder(config, GemmaForCausalLM, tmp_path, edit=old_rope if old else None)


@pytest.mark.parametrize("name", GEMMA2)
@pytest.mark.parametrize("old", [False, True])
def test_gemma2(name: str, old: bool, tmp_path: Path) -> None:
    config = Gemma2Config(**{**SMALL, **GEMMA2[name]})
    check_decoder(config, Gemma2ForCausalLM, tmp_path, edit=old_rope if old else None)


def test_gemma2_files_from_before_layer_types(tmp_path: Path) -> None:
    model = check_decoder(Gemma2Config(**SMALL), Gemma2ForCausalLM, tmp_path, edit=without("layer_types"))
    assert [layer["attn"].fn.cfg.window for layer in model.layers] == [6, None, 6, None]


@pytest.mark.parametrize("name", GEMMA3)
def test_gemma3(name: str, tmp_path: Path) -> None:
    check_decoder(Gemma3TextConfig(**{**SMALL, **GEMMA3[name]}), Gemma3ForCausalLM, tmp_path)


@pytest.mark.parametrize("name", ["plain", "stretched"])
def test_gemma3_older_files(name: str, tmp_path: Path) -> None:
    config = Gemma3TextConfig(**{**SMALL, **GEMMA3[name]})
    model = check_decoder(config, Gemma3ForCausalLM, tmp_path, edit=old_gemma3)
    assert [layer["attn"].fn.cfg.window for layer in model.layers][:6] == [6] * 5 + [None]
    assert [layer["attn"].fn.cfg.rope.theta for layer in model.layers][:6] == [1e4] * 5 + [1e6]
    assert model.layers[0]["attn"].fn.cfg.rope.scaling is None


@pytest.mark.parametrize(
    ("keys", "act"),
    [
        ({}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": None}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ({"hidden_activation": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ({"hidden_act": "silu"}, "silu"),
    ],
)
def test_the_activations_two_names(keys: dict, act: str) -> None:
    assert geglu(Keys({"intermediate_size": 8, **keys})).act == act


def test_activations_that_disagree() -> None:
    with pytest.raises(ValueError, match="'relu' and hidden_activation 'silu' disagree"):
        geglu(Keys({"intermediate_size": 8, "hidden_act": "relu", "hidden_activation": "silu"}))


def test_what_is_not_understood() -> None:
    for keys, name in (
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ):
        with pytest.raises(ValueError, match=name):
            landmark.build({"architectures": ["Gemma3ForCausalLM"], **SMALL, **keys})

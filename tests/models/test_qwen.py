from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import landmark

from .families import check_decoder
from .layouts import old_rope, without

BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=64)
WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
QWEN2 = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "mqa": {"num_key_value_heads": 1},
    "yarn": {"rope_parameters": YARN},
    "upper layers windowed": WINDOW,
    "listed layers windowed": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
QWEN3 = {
    "plain": {"head_dim": 8},
    "wide heads": {"head_dim": 14, "num_attention_heads": 3, "num_key_value_heads": 3},
    "tied and biased": {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True},
    "upper layers windowed": {"head_dim": 8, **WINDOW},
}


@pytest.mark.parametrize("name", QWEN2)
@pytest.mark.parametrize("old", [False, True])
def test_qwen2(name: str, old: bool, tmp_path: Path) -> None:
    config = Qwen2Config(**{**BASE, **QWEN2[name]})
    model = check_decoder(config, Qwen2ForCausalLM, tmp_path, edit=old_rope if old else None)
    attn = model.layers[0]["attn"].fn
    assert attn.q.bias is not None and attn.v.bias is not None and attn.out.bias is None


@pytest.mark.parametrize("name", QWEN3)
@pytest.mark.parametrize("old", [False, True])
def test_qwen3(name: str, old: bool, tmp_path: Path) -> None:
    config = Qwen3Config(**{**BASE, **QWEN3[name]})
    check_decoder(config, Qwen3ForCausalLM, tmp_path, edit=old_rope if old else None)


@pytest.mark.parametrize(("config", "cls"), [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
def test_files_from_before_layer_types(config: type, cls: type, tmp_path: Path) -> None:
    edit = without("layer_types")
    model = check_decoder(config(**{**BASE, **WINDOW}), cls, tmp_path, edit=edit)
    assert [layer["attn"].fn.cfg.window for layer in model.layers] == [None, None, 6, 6]


def test_a_window_that_is_not_used_is_inert() -> None:
    hf = {"architectures": ["Qwen2ForCausalLM"], **BASE, **WINDOW, "use_sliding_window": False}
    assert landmark.build(hf).layers[3]["attn"].fn.cfg.window is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layer_types": ["full_attention"] * 3}, "names 3 layers, but num_hidden_layers is 4"),
        ({"layer_types": ["full_atention"] * 4}, "did you mean 'full_attention'"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer 0 is to slide"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        ({"hidden_act": "sulu"}, "did you mean 'silu'"),
    ],
)
def test_bad_keys(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": ["Qwen2ForCausalLM"], **BASE, **keys})

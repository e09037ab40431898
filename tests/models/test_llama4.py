from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

import landmark
from landmark.nn.chunked import ChunkCache
from landmark.nn.moe import MoE

from .families import check_decoder
from .layouts import old_rope

BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=24, intermediate_size_mlp=48, num_hidden_layers=4)
BASE |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0)
BASE |= dict(num_local_experts=4, attention_chunk_size=6, floor_scale=3)
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "plain": {},
    "without a norm, without temperature": {"use_qk_norm": False, "attn_temperature_tuning": False},
    "every other layer dense": {"interleave_moe_layer_step": 2},
    "listed layers": {"moe_layers": [0, 3], "no_rope_layers": [0, 1, 1, 0]},
    "two of four, in their scores": {"num_experts_per_tok": 2},
    "one chunk": {"attention_chunk_size": 64},
    "biased": {"attention_bias": True},
    "stretched": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, **BANDS}},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("old", [False, True])
def test_llama4(name: str, old: bool, tmp_path: Path) -> None:
    config = Llama4TextConfig(**{**BASE, **CASES[name]})
    check_decoder(config, Llama4ForCausalLM, tmp_path, edit=old_rope if old else None)


def test_state_is_of_one_chunk_where_that_is_all_a_layer_sees() -> None:
    model = landmark.build({"architectures": ["Llama4ForCausalLM"], **BASE}).eval()
    state = model.new_state(2, capacity=50)
    kinds = [isinstance(layer["attn"], ChunkCache) for layer in state.layers]
    assert kinds == [True, True, True, False]
    with torch.no_grad():
        for _ in range(9):
            model(torch.ones(2, 3, dtype=torch.long), state=state)
    assert state.layers[0]["attn"].tensors["k"].shape == (2, 2, 6, 16)


def test_which_layers_are_sparse_and_rotary() -> None:
    hf = {"architectures": ["Llama4ForCausalLM"], **BASE, "interleave_moe_layer_step": 2, "no_rope_layers": []}
    layers = landmark.build(hf).layers
    assert [isinstance(layer["ffn"].fn, MoE) for layer in layers] == [False, True, False, True]
    assert [layer["attn"].fn.rope is not None for layer in layers] == [True, True, True, False]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"moe_layers": [4]}, "moe_layers has 4, but num_hidden_layers is 4"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers names 2 layers"),
        ({"attention_chunk_size": 0}, "Attention.chunk is 0"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"num_experts_per_tok": 5}, "MoE.active is 5"),
    ],
)
def test_bad_keys(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": ["Llama4ForCausalLM"], **BASE, **keys})

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .families import check_decoder
from .layouts import old_rope

BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None)
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "odd heads": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 14},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ROPE}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("old", [False, True])
def test_parity(name: str, old: bool, tmp_path: Path) -> None:
    config = LlamaConfig(**{**BASE, **VARIANTS[name]})
    check_decoder(config, LlamaForCausalLM, tmp_path, edit=old_rope if old else None)


def test_long_text_rope(tmp_path: Path) -> None:
    """Ways that depend on the length of the text; a cached key keeps its first rotation, so decoding is apart."""
    for kind in (
        {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0},
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0, 1.1, 1.5, 2.0],
            "long_factor": [2.0, 3.0, 5.0, 9.0],
        },
    ):
        extra = {"rope_parameters": {**ROPE, **kind}, "max_position_embeddings": 16}
        directory = tmp_path / kind["rope_type"]
        model = check_decoder(LlamaConfig(**{**BASE, **extra}), LlamaForCausalLM, directory, decode=False)
        assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 97)

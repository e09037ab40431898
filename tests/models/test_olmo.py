from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Olmo2Config, Olmo2ForCausalLM

import landmark

from .encoders import check_sizes
from .families import check_decoder
from .layouts import old_rope

BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
BASE |= dict(num_key_value_heads=4, max_position_embeddings=64, eos_token_id=0)
VARIANTS = {
    "plain": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa, other base": {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "tied and biased": {"tie_word_embeddings": True, "attention_bias": True},
    "wide heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 14, "rms_norm_eps": 1e-3},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("old", [False, True])
def test_parity(name: str, old: bool, tmp_path: Path) -> None:
    config = Olmo2Config(**{**BASE, **VARIANTS[name]})
    check_decoder(config, Olmo2ForCausalLM, tmp_path, edit=old_rope if old else None)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("olmo2-1b", 1_484_916_736),
        ("olmo2-7b", 7_298_617_344),
        ("olmo2-13b", 13_716_198_400),
        ("olmo2-32b", 32_234_279_936),
    ],
)
def test_sizes(name: str, count: int) -> None:
    check_sizes(name, Olmo2Config, Olmo2ForCausalLM, count)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "siluu"}, "did you mean 'silu'"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"num_key_value_heads": 3}, "does not divide heads 4"),
        ({"sliding_window": 8}, "sliding_window"),
    ],
)
def test_bad_keys(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": ["Olmo2ForCausalLM"], **BASE, **keys})

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import MistralConfig, MistralForCausalLM

import landmark
from landmark.nn.attention import Attention

from .families import check_decoder
from .layouts import old_rope

BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=64, sliding_window=None)
VARIANTS = {
    "full": {},
    "window": {"sliding_window": 7},
    "window of one": {"sliding_window": 1},
    "window longer than the text": {"sliding_window": 40},
    "wide heads": {"head_dim": 14, "num_attention_heads": 3, "num_key_value_heads": 1, "sliding_window": 5},
    "tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("old", [False, True])
def test_parity(name: str, old: bool, tmp_path: Path) -> None:
    config = MistralConfig(**{**BASE, **VARIANTS[name]})
    model = check_decoder(config, MistralForCausalLM, tmp_path, edit=old_rope if old else None)
    attn = [module for module in model.modules() if isinstance(module, Attention)]
    assert {module.cfg.window for module in attn} == {config.sliding_window}


def test_an_absent_window_is_the_first_releases() -> None:
    hf = {"architectures": ["MistralForCausalLM"], **BASE}
    del hf["sliding_window"]
    assert landmark.build(hf).layers[0]["attn"].fn.cfg.window == 4096

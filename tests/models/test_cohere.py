from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Cohere2Config, Cohere2ForCausalLM, CohereConfig, CohereForCausalLM

import landmark

from .encoders import check_sizes
from .families import check_decoder
from .layouts import old_rope

BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
DYNAMIC = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
COHERE = {
    "plain": {},
    "mqa": {"num_key_value_heads": 1, "logit_scale": 0.8333},
    "norms on queries and keys": {"use_qk_norm": True},
    "untied and biased": {"tie_word_embeddings": False, "attention_bias": True},
    "wide heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 14, "use_qk_norm": True},
    "stretched": {"rope_parameters": {**DYNAMIC, "original_max_position_embeddings": 16}},
}
COHERE2 = {
    "plain": {"num_hidden_layers": 5},
    "listed layers": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "untied and biased": {"tie_word_embeddings": False, "attention_bias": True},
    "odd heads": {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 1},
}
PUBLISHED = {
    "layer_switch": 4, "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0, "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True,
    "use_parallel_embedding": False, "use_qk_norm": False, "sliding_window_pattern": 4,
}  # fmt: skip


def older(hf: dict) -> dict:
    """The first Cohere 2 files: a pattern instead of a list, and how the layers are made."""
    del hf["layer_types"]
    return old_rope(hf) | PUBLISHED


@pytest.mark.parametrize("name", COHERE)
@pytest.mark.parametrize("old", [False, True])
def test_cohere(name: str, old: bool, tmp_path: Path) -> None:
    config = CohereConfig(**{**BASE, **COHERE[name]})
    check_decoder(config, CohereForCausalLM, tmp_path, edit=old_rope if old else None)


@pytest.mark.parametrize("name", COHERE2)
def test_cohere2(name: str, tmp_path: Path) -> None:
    config = Cohere2Config(**{**BASE, "sliding_window": 6, **COHERE2[name]})
    check_decoder(config, Cohere2ForCausalLM, tmp_path)


def test_cohere2_older_files(tmp_path: Path) -> None:
    config = Cohere2Config(**BASE, sliding_window=6)
    model = check_decoder(config, Cohere2ForCausalLM, tmp_path, edit=older)
    attention = [layer["both"].fns["attn"].cfg for layer in model.layers]
    assert [cfg.window for cfg in attention] == [6, 6, 6, None]
    assert [cfg.rope is None for cfg in attention] == [False, False, False, True]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("command-r", 34_980_831_232),
        ("command-r-08-2024", 32_296_476_672),
        ("command-r-plus", 103_810_674_688),
        ("command-r-plus-08-2024", 103_810_674_688),
    ],
)
def test_cohere_sizes(name: str, count: int) -> None:
    check_sizes(name, CohereConfig, CohereForCausalLM, count)


@pytest.mark.parametrize(("name", "count"), [("command-r7b", 8_028_033_024), ("command-a", 111_057_580_032)])
def test_cohere2_sizes(name: str, count: int) -> None:
    check_sizes(name, Cohere2Config, Cohere2ForCausalLM, count)


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("CohereForCausalLM", {"hidden_act": "sily"}, "did you mean 'silu'"),
        ("CohereForCausalLM", {"num_attention_heads": 5, "num_key_value_heads": 5}, "no 5 equal parts"),
        ("CohereForCausalLM", {"num_key_value_heads": 3}, "does not divide heads 4"),
        ("CohereForCausalLM", {"sliding_window": 8}, "sliding_window"),
        ("Cohere2ForCausalLM", {"layer_types": ["sliding"] * 4}, "the layer type 'sliding' is not supported"),
        ("Cohere2ForCausalLM", {"layer_switch": 3}, "layer_switch = 3 is not supported"),
        ("Cohere2ForCausalLM", {"position_embedding_type": "alibi"}, "position_embedding_type"),
        ("Cohere2ForCausalLM", {"sliding_window": None}, "sliding_window gives no width"),
    ],
)
def test_bad_keys(architecture: str, keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": [architecture], **BASE, **keys})

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import landmark
from landmark.nn.moe import MoE

from .families import check_decoder
from .layouts import old_rope

BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=64, head_dim=8, moe_intermediate_size=12)
BASE |= dict(num_experts=16, num_experts_per_tok=4, norm_topk_prob=True)
CASES = {
    "plain": {},
    "weights as they are": {"norm_topk_prob": False},
    "every other layer, as GLaM": {"decoder_sparse_step": 2, "num_experts_per_tok": 2},
    "dense first layer": {"mlp_only_layers": [0]},
    "windowed": {"use_sliding_window": True, "sliding_window": 6},
    "biased": {"attention_bias": True},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("old", [False, True])
def test_qwen3_moe(name: str, old: bool, tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**{**BASE, **CASES[name]})
    check_decoder(config, Qwen3MoeForCausalLM, tmp_path, edit=old_rope if old else None)


def test_which_layers_are_sparse() -> None:
    hf = {"architectures": ["Qwen3MoeForCausalLM"], **BASE, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert [isinstance(layer["ffn"].fn, MoE) for layer in landmark.build(hf).layers] == [False, True, False, False]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_experts_per_tok": 17}, "MoE.active is 17, but there are 16 experts"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ({"mlp_only_layers": [4]}, r"mlp_only_layers = \[4\] must fit 4 layers"),
    ],
)
def test_bad_keys(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": ["Qwen3MoeForCausalLM"], **BASE, **keys})

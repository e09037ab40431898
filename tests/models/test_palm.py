from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM

import landmark
from landmark.models.base import Init
from landmark.weights.checkpoint import describe

from .families import check_decoder
from .layouts import old_rope

BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
BASE |= dict(num_key_value_heads=1, max_position_embeddings=64, head_dim=8)
VARIANTS = {
    "plain": {},
    "heads wider than the model": {"head_dim": 14, "num_attention_heads": 5},
    "untied": {"tie_word_embeddings": False},
    "relu": {"hidden_act": "relu", "layer_norm_eps": 1e-3},
    "other base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}


def as_palm(hf: dict) -> dict:
    own = {"architectures": ["PaLMForCausalLM"], "model_type": "palm"}
    return {**{k: v for k, v in hf.items() if k not in ("logit_scale", "use_qk_norm", "attention_bias")}, **own}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("old", [False, True])
def test_parity(name: str, old: bool, tmp_path: Path) -> None:
    """Cohere's model with one head of keys and logits scaled by 1 / sqrt(width) is PaLM's."""
    config = CohereConfig(**{"logit_scale": 32**-0.5, **BASE, **VARIANTS[name]})

    def edit(hf: dict) -> dict:
        return as_palm(old_rope(hf) if old else hf)

    check_decoder(config, CohereForCausalLM, tmp_path, edit=edit)


@pytest.mark.parametrize(("name", "billions"), [("palm-8b", 8.63), ("palm-62b", 62.50), ("palm-540b", 540.35)])
def test_sizes(name: str, billions: float) -> None:
    """As the reference of the same shape, and as table 1 prints them, in billions."""
    ours, hf = describe(name)
    with torch.device("meta"):
        count = sum(p.numel() for p in ours.build().parameters())
        config = CohereConfig(**{k: v for k, v in hf.items() if k not in ("architectures", "model_type")})
        assert count == sum(p.numel() for p in CohereForCausalLM(config).parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.01)


def test_initial_weights() -> None:
    """Embeddings ~ N(0, 1), matrices ~ N(0, 1 / inputs), and so logits of about unit variance (sec. 5)."""
    torch.manual_seed(0)
    model = landmark.build({"architectures": ["PaLMForCausalLM"], **BASE, "hidden_size": 64, "vocab_size": 999})
    assert model.get_parameter("embed.tokens.weight").std().item() == pytest.approx(1.0, rel=0.02)
    for name in ("attn.q", "attn.out", "ffn.up", "ffn.down"):
        weight = model.get_parameter(f"layers.1.both.fns.{name}.weight")
        assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.04), name
    with torch.no_grad():
        assert 0.5 < model(torch.arange(40)[None]).std().item() < 2
    with pytest.raises(ValueError, match=r"Init\.embedding"):
        Init(std=None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2 is not supported"),
        ({"hidden_act": "swiglu"}, "unknown activation 'swiglu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"head_dim": 7}, "choose an even part of 7"),
    ],
)
def test_bad_keys(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": ["PaLMForCausalLM"], **BASE, **keys})

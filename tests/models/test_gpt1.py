from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

import landmark

from .encoders import check_sizes
from .families import check_decoder, close, reference, with_prefix_removed

BASE = dict(vocab_size=97, n_positions=40, n_embd=32, n_layer=3, n_head=4)
VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "odd heads": {"n_embd": 21, "n_head": 3},
    "relu": {"afn": "relu", "layer_norm_epsilon": 1e-3},
    "swish": {"afn": "swish"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parity(name: str, tmp_path: Path) -> None:
    check_decoder(OpenAIGPTConfig(**{**BASE, **VARIANTS[name]}), OpenAIGPTLMHeadModel, tmp_path)


def test_the_published_file(tmp_path: Path) -> None:
    """It was saved without its head, with the causal masks, and with keys that say nothing."""
    theirs = reference(OpenAIGPTConfig(**BASE), OpenAIGPTLMHeadModel, tmp_path)
    with_prefix_removed(tmp_path, "transformer.")
    path = tmp_path / "model.safetensors"
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 40, 40).tril() for i in range(3)}
    save_file({**load_file(path), **masks, "position_ids": torch.arange(40)}, path, metadata={"format": "pt"})
    tokens = torch.arange(60).view(2, 30)
    model = landmark.load(tmp_path)
    close(model(tokens), theirs(tokens).logits)
    landmark.save(model, tmp_path / "back")
    back = OpenAIGPTLMHeadModel.from_pretrained(tmp_path / "back").eval()
    close(model(tokens), back(tokens).logits)


def test_size() -> None:
    check_sizes("gpt1", OpenAIGPTConfig, OpenAIGPTLMHeadModel, 116_534_784)


def test_initial_weights() -> None:
    """All ~ N(0, 0.02^2): post-norm layers need no smaller ends (sec. 4.1)."""
    model = landmark.build({"architectures": ["OpenAIGPTLMHeadModel"], **BASE, "n_embd": 128, "n_layer": 8})
    for name in ("embed.tokens.weight", "layers.7.attn.fn.out.weight", "layers.0.ffn.fn.down.weight"):
        assert abs(model.get_parameter(name).std().item() - 0.02) < 5e-4, name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"afn": "gello"}, "did you mean 'gelu'"),
        ({"n_head": 5}, "n_embd = 32 has no 5 equal parts"),
        ({"n_head": 0}, "n_embd = 32 has no 0 equal parts"),
        ({"n_embed": 64}, "did you mean 'n_embd'"),
        ({"n_layer": None}, "n_layer"),
    ],
)
def test_bad_keys(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": ["OpenAIGPTLMHeadModel"], **BASE, **keys})

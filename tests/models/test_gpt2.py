from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import landmark

from .encoders import check_sizes
from .families import check_decoder, close, reference, with_prefix_removed

BASE = dict(vocab_size=97, n_positions=40, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "odd heads": {"n_embd": 21, "n_head": 3},
    "narrow feed-forward": {"n_inner": 20},
    "relu": {"activation_function": "relu", "layer_norm_epsilon": 1e-3},
    "exact gelu": {"activation_function": "gelu"},
    "scores not scaled": {"scale_attn_weights": False},
    "scores scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "scores scaled by layer only": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parity(name: str, tmp_path: Path) -> None:
    check_decoder(GPT2Config(**{**BASE, **VARIANTS[name]}), GPT2LMHeadModel, tmp_path)


def test_published_files(tmp_path: Path) -> None:
    """They were saved without their head, with the causal masks."""
    theirs = reference(GPT2Config(**BASE), GPT2LMHeadModel, tmp_path)
    with_prefix_removed(tmp_path, "transformer.")
    path = tmp_path / "model.safetensors"
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 40, 40).tril() for i in range(3)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    save_file({**load_file(path), **masks}, path, metadata={"format": "pt"})
    tokens = torch.arange(60).view(2, 30)
    model = landmark.load(tmp_path)
    close(model(tokens), theirs(tokens).logits)
    landmark.save(model, tmp_path / "back")
    close(model(tokens), GPT2LMHeadModel.from_pretrained(tmp_path / "back").eval()(tokens).logits)


def test_a_tied_head_that_was_written_out(tmp_path: Path) -> None:
    reference(GPT2Config(**BASE), GPT2LMHeadModel, tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    table = weights["transformer.wte.weight"]
    save_file({**weights, "lm_head.weight": table.clone()}, path, metadata={"format": "pt"})
    landmark.load(tmp_path)
    save_file({**weights, "lm_head.weight": table + 1}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no copy of the embedding"):
        landmark.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_sizes(name: str, count: int) -> None:
    check_sizes(name, GPT2Config, GPT2LMHeadModel, count)


def test_initial_weights() -> None:
    """Matrices that end a sublayer are smaller by the root of their number (sec. 2.3)."""
    model = landmark.build({"architectures": ["GPT2LMHeadModel"], **BASE, "n_embd": 128, "n_layer": 8})
    wanted = {
        "embed.tokens": 0.02,
        "embed.positions.table": 0.02,
        "layers.3.attn.fn.q": 0.02,
        "layers.5.ffn.fn.up": 0.02,
    }
    wanted |= {"layers.3.attn.fn.out": 0.005, "layers.5.ffn.fn.down": 0.005}
    for name, std in wanted.items():
        assert model.get_parameter(f"{name}.weight").std().item() == pytest.approx(std, rel=0.03), name
    assert not model.get_parameter("layers.3.attn.fn.out.bias").any()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"activation_function": "gelu_newer"}, "unknown activation 'gelu_newer'"),
        ({"n_head": 5}, "n_embd = 32 has no 5 equal parts"),
        ({"add_cross_attention": True}, "add_cross_attention = True is not supported"),
        ({"attention_window": 5}, "attention_window"),
        ({"n_positions": -1}, "n_positions|LearnedPositions"),
    ],
)
def test_bad_keys(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": ["GPT2LMHeadModel"], **BASE, **keys})

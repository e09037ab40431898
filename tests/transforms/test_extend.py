"""A stretched model is what transformers makes of the same keys, and short texts keep what the paper keeps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import landmark
from landmark.models.base import Model
from landmark.transforms.extend import extend_context

HF = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    built = landmark.build(HF)
    with torch.no_grad():
        for p in built.parameters():
            p += torch.randn_like(p) * 0.2
    return built.eval()


@pytest.mark.parametrize(("way", "options"), [("linear", {}), ("yarn", {}), ("llama3", {}), ("abf", {"theta": 5e5})])
def test_saved_for_transformers(model: Model, way: str, options: dict, tmp_path: Path) -> None:
    new = extend_context(model, way, 4.0, **options)
    assert new.cfg.context == 64  # type: ignore[attr-defined]
    landmark.save(new, tmp_path)
    tokens = torch.randint(0, 50, (2, 60))
    with torch.no_grad():
        ours, old = landmark.load(tmp_path)(tokens), model(tokens)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()
    assert (ours - old).abs().max() > 1e-2


@pytest.mark.parametrize("way", ["ntk", "dynamic"])
def test_saved_and_loaded(model: Model, way: str, tmp_path: Path) -> None:
    new = extend_context(model, way, 4.0)
    landmark.save(new, tmp_path)
    tokens = torch.randint(0, 50, (1, 40))
    with torch.no_grad():
        assert torch.equal(landmark.load(tmp_path)(tokens), new(tokens))


def test_dynamic_changes_nothing_within_the_old_context(model: Model) -> None:
    tokens = torch.randint(0, 50, (1, 16))
    with torch.no_grad():
        assert torch.allclose(extend_context(model, "dynamic", 4.0)(tokens), model(tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("way", "factor", "message"),
    [
        ("yran", 2.0, "did you mean 'yarn'"),
        ("yarn", 0.5, "factor of 0.5"),
        ("yarn", math.nan, "factor of nan"),
        ("abf", 2.0, "abf needs it"),
    ],
)
def test_bad_input(model: Model, way: str, factor: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extend_context(model, way, factor)


def test_a_model_without_rotary_positions() -> None:
    gpt2 = {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 20,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 9,
    }
    with pytest.raises(ValueError, match="no rotary positions"):
        extend_context(landmark.build(gpt2), "yarn", 2.0)

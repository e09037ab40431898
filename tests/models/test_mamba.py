from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

import landmark
from landmark.models.inspect import figures

from .families import check_decoder, close, reference
from .test_sizes import meta

BASE = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, state_size=16)
CASES = {
    "plain": {},
    "other sizes": {"state_size": 5, "expand": 3, "conv_kernel": 3, "time_step_rank": 7},
    "biases": {"use_bias": True, "use_conv_bias": False},
    "own head": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", CASES)
def test_mamba(name: str, tmp_path: Path) -> None:
    check_decoder(MambaConfig(**BASE | CASES[name]), MambaForCausalLM, tmp_path)


def test_old_files(tmp_path: Path) -> None:
    """The first files call the table `embedding` and write the tied head out."""
    theirs = reference(MambaConfig(**BASE), MambaForCausalLM, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    table = weights.pop("backbone.embeddings.weight")
    save_file(weights | {"backbone.embedding.weight": table}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        close(landmark.load(tmp_path)(tokens), theirs(tokens, use_cache=False).logits)


def test_in_bfloat16_the_state_stays_float32(tmp_path: Path) -> None:
    theirs = reference(MambaConfig(**BASE), MambaForCausalLM, tmp_path)
    model, tokens = landmark.load(tmp_path, dtype="bfloat16"), torch.randint(0, 97, (2, 60))
    state = model.new_state(2, 60)
    with torch.no_grad():
        whole = model(tokens)
        steps = torch.cat([model(tokens[:, t : t + 1], state=state) for t in range(60)], 1)
        exact = theirs(tokens, use_cache=False).logits
    tensors = state.layers[0]["mixer"].tensors
    assert tensors["ssm"].dtype == torch.float32 and tensors["conv"].dtype == torch.bfloat16
    for ours in (whole, steps):
        assert (ours - exact).abs().max() < 0.06 * exact.abs().max()


def test_figures() -> None:
    made = figures(meta("mamba-130m")[1], context=4096)
    assert made.cache_per_token == made.cache_growth == 0
    assert made.cache == 24 * 1536 * (3 * 2 + 16 * 4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"state_size": 0}, "Mamba.state is 0"),
        ({"time_step_min": 1.0}, "StepInit has low = 1.0"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps"),
    ],
)
def test_bad_keys(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": ["MambaForCausalLM"], **BASE, **keys})

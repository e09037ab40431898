from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Mamba2Config, Mamba2ForCausalLM

import landmark
from landmark.models.inspect import figures

from .families import check_decoder
from .test_sizes import meta

BASE = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_heads=8, head_dim=8, state_size=16, n_groups=2)
BASE |= dict(chunk_size=8)
CASES = {
    "plain": {},
    "one group": {"n_groups": 1, "tie_word_embeddings": True},
    "a group a head": {"n_groups": 8, "chunk_size": 256},
    "other sizes": {"head_dim": 16, "num_heads": 6, "expand": 3, "conv_kernel": 3, "state_size": 5},
    "biases": {"use_bias": True, "use_conv_bias": False},
    "limits": {"time_step_limit": (0.4, 1.1)},
}


@pytest.mark.parametrize("name", CASES)
def test_mamba2(name: str, tmp_path: Path) -> None:
    check_decoder(Mamba2Config(**BASE | CASES[name]), Mamba2ForCausalLM, tmp_path)


def test_figures() -> None:
    made = figures(meta("codestral-mamba-7b")[1], context=4096)
    assert made.cache_per_token == made.cache_growth == 0
    assert made.cache == 64 * (3 * (8192 + 2 * 8 * 128) * 2 + 8192 * 128 * 4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n_groups": 3}, "Mamba2.groups is 3, which does not divide heads 8"),
        ({"num_heads": 7}, "num_heads 7 x head_dim 8 must be expand 2 x hidden_size 32"),
        ({"time_step_limit": [2.0, 1.0]}, "Mamba2.least_step is 2.0 and most_step 1.0"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
    ],
)
def test_bad_keys(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": ["Mamba2ForCausalLM"], **BASE, **keys})

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import landmark

from .encoders import check_sizes
from .families import check_decoder, close, reference, with_prefix_removed

BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
BASE |= dict(max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
QUARTER = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
VARIANTS = {
    "plain": {},
    "one after the other": {"use_parallel_residual": False},
    "tied": {"tie_word_embeddings": True},
    "no biases in attention": {"attention_bias": False},
    "odd heads, half turned": {
        "hidden_size": 60, "num_attention_heads": 5, "rope_parameters": {**QUARTER, "partial_rotary_factor": 0.5},
    },
    "all turned": {"rope_parameters": {**QUARTER, "partial_rotary_factor": 1.0, "rope_theta": 500.0}},
    "linear": {"rope_parameters": {**QUARTER, "rope_type": "linear", "factor": 4.0}},
    "gelu_fast": {"hidden_act": "gelu_fast", "layer_norm_eps": 1e-3},
}  # fmt: skip


def old(hf: dict) -> dict:
    """Keys of the first files: `rotary_pct`, `rotary_emb_base`, `rope_scaling`."""
    values = dict(hf.pop("rope_parameters"))
    hf |= {"rotary_pct": values.pop("partial_rotary_factor"), "rotary_emb_base": values.pop("rope_theta")}
    kind = values.pop("rope_type")
    return hf | {"rope_scaling": None if kind == "default" else {"type": kind, **values}}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("edit", [None, old])
def test_parity(name: str, edit: Callable[[dict], dict] | None, tmp_path: Path) -> None:
    check_decoder(GPTNeoXConfig(**{**BASE, **VARIANTS[name]}), GPTNeoXForCausalLM, tmp_path, edit=edit)


@pytest.mark.parametrize("parallel", [True, False])
def test_published_files(parallel: bool, tmp_path: Path) -> None:
    """They have the masks and angles of every layer."""
    theirs = reference(GPTNeoXConfig(**BASE, use_parallel_residual=parallel), GPTNeoXForCausalLM, tmp_path)
    path = tmp_path / "model.safetensors"
    buffers = {}
    for i in range(3):
        at = f"gpt_neox.layers.{i}.attention."
        buffers |= {at + "bias": torch.ones(1, 1, 64, 64).tril(), at + "masked_bias": torch.tensor(-1e9)}
        buffers |= {at + "rotary_emb.inv_freq": torch.ones(1)}
    save_file({**load_file(path), **buffers}, path, metadata={"format": "pt"})
    tokens = torch.arange(60).view(2, 30)
    model = landmark.load(tmp_path)
    close(model(tokens), theirs(tokens).logits)
    landmark.save(model, tmp_path / "back")
    close(model(tokens), GPTNeoXForCausalLM.from_pretrained(tmp_path / "back").eval()(tokens).logits)


def test_a_body_without_its_head(tmp_path: Path) -> None:
    reference(GPTNeoXConfig(**BASE), GPTNeoXForCausalLM, tmp_path)
    with_prefix_removed(tmp_path, "gpt_neox.")
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*head.linear.weight"):
        landmark.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert landmark.load(tmp_path)(torch.arange(9)[None]).shape == (1, 9, 97)


COUNTS = {  # Biderman et al. 2023, table 1; GPT-NeoX-20B: Black et al. 2022, sec. 2
    "pythia-70m": 70_426_624, "pythia-160m": 162_322_944, "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960, "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320, "gpt-neox-20b": 20_554_567_680,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_sizes(name: str) -> None:
    check_sizes(name, GPTNeoXConfig, GPTNeoXForCausalLM, COUNTS[name])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "gelu_fst"}, "did you mean"),
        ({"num_attention_heads": 5}, "hidden_size = 32 has no 5 equal parts"),
        ({"rotary_pct": 0.4}, "choose an even part of 8, not 3"),
        ({"rotary_percent": 0.5}, "did you mean 'rotary_pct'"),
        ({"rope_scaling": {"type": "liner", "factor": 2.0}}, "unknown rope type 'liner'; did you mean 'linear'"),
    ],
)
def test_bad_keys(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": ["GPTNeoXForCausalLM"], **BASE, **keys})

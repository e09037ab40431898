from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import JambaConfig, JambaForCausalLM

import landmark
from landmark.models.inspect import figures, state_bytes
from landmark.nn.moe import MoE

from .families import check_decoder
from .test_sizes import meta

BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=64, num_experts=4, attn_layer_period=3, attn_layer_offset=1)
CASES = {
    "plain": {},
    "attention first, experts everywhere": {
        "attn_layer_offset": 0, "attn_layer_period": 2, "expert_layer_period": 1, "expert_layer_offset": 0,
    },
    "one expert": {"num_experts": 1, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    "other sizes": {"mamba_d_state": 5, "mamba_d_conv": 3, "mamba_expand": 3, "mamba_dt_rank": 7},
    "biases": {"mamba_proj_bias": True, "mamba_conv_bias": False},
    "no attention": {"attn_layer_period": 8, "attn_layer_offset": 7},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_jamba(name: str, tmp_path: Path) -> None:
    check_decoder(JambaConfig(**BASE | CASES[name], use_mamba_kernels=False), JambaForCausalLM, tmp_path)


def test_which_layers() -> None:
    layers = meta("jamba-v0.1")[1].layers
    attends = [i for i, layer in enumerate(layers) if "attn" in layer]
    assert attends == [4, 12, 20, 28] and all(layers[i]["attn"].fn.rope is None for i in attends)
    assert sum("mamba" in layer for layer in layers) == 28
    assert [i for i, layer in enumerate(layers) if isinstance(layer["ffn"].fn, MoE)] == list(range(1, 32, 2))


def test_the_cache_of_a_long_text() -> None:
    """Table 1 of the paper: at 256K tokens in 16 bits, 4 GB beside Mixtral's 32 GB and Llama 2's 128."""
    tokens, gigabyte = 256 * 1024, 2**30
    for name, said in (("jamba-v0.1", 4), ("mixtral-8x7b", 32), ("mistral-7b-v0.2", 32), ("llama2-7b", 128)):
        made = figures(meta(name)[1], context=tokens)
        assert made.cache is not None and made.cache_per_token is not None
        assert made.cache_per_token * tokens == said * gigabyte
        assert round(made.cache / gigabyte) == said  # what is not of a token is small beside it
    short, long = state_bytes(meta("jamba-v0.1")[1], torch.bfloat16, 1, 1 + tokens)
    assert long - short == 4 * gigabyte


def test_a_round_of_training(tmp_path: Path) -> None:
    """Every parameter learns, and what was learned is written as a file of the family."""
    model = landmark.build({"architectures": ["JambaForCausalLM"], "model_type": "jamba", **BASE})
    tokens = torch.randint(0, 97, (4, 30), generator=torch.Generator().manual_seed(0))
    segments = torch.arange(30)[None] // torch.tensor([[30], [7], [11], [16]])
    model.loss(model.hidden(tokens, segments=segments), tokens.roll(-1, 1)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    landmark.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "jamba"
    with torch.no_grad():
        assert torch.equal(landmark.load(tmp_path)(tokens), model(tokens))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attn_layer_offset": 3}, "attn_layer_offset = 3 must be below attn_layer_period = 3"),
        ({"expert_layer_offset": 2}, "expert_layer_offset = 2 must be below expert_layer_period = 2"),
        ({"num_experts_per_tok": 5}, "MoE.active is 5, but there are 4 experts"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_theta": 1e4}, "rope_theta"),
    ],
)
def test_bad_keys(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": ["JambaForCausalLM"], **BASE, **keys})

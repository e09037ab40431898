from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

import landmark
from landmark.models.inspect import figures
from landmark.nn.moe import MoE

from .families import check_decoder, reference
from .layouts import old_rope

BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2)
CASES = {
    "plain": {},
    "window": {"sliding_window": 6},
    "one of many": {"num_local_experts": 16, "num_experts_per_tok": 1},
    "all of them": {"num_local_experts": 3, "num_experts_per_tok": 3},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("old", [False, True])
def test_mixtral(name: str, old: bool, tmp_path: Path) -> None:
    config = MixtralConfig(**{**BASE, **CASES[name]})
    check_decoder(config, MixtralForCausalLM, tmp_path, edit=old_rope if old else None)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    reference(MixtralConfig(**BASE), MixtralForCausalLM, tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    for expert in (3, 1):
        missing = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
        save_file({name: tensor for name, tensor in whole.items() if name != missing}, path)
        with pytest.raises(ValueError, match=f"'{missing}' is missing"):
            landmark.load(tmp_path)


def test_the_balance_loss_is_on_where_the_file_says_so() -> None:
    hf = {"architectures": ["MixtralForCausalLM"], **BASE, "router_aux_loss_coef": 0.02}
    for on, weight in ((False, 0.0), (True, 0.02)):  # 0.02 x 2 of its experts / 2 layers
        experts = landmark.build({**hf, "output_router_logits": on}).layers[0]["ffn"].fn
        assert isinstance(experts, MoE) and experts.router.cfg.balance == pytest.approx(weight)


def test_active_parameters() -> None:
    model = landmark.build({"architectures": ["MixtralForCausalLM"], **BASE})
    made = figures(model)
    assert made.parameters - made.active == 2 * (4 - 2) * 3 * 32 * 48


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_experts_per_tok": 5}, "MoE.active is 5, but there are 4 experts"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({"num_local_experts": 0}, "MoE.experts is 0"),
    ],
)
def test_bad_keys(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": ["MixtralForCausalLM"], **BASE, **keys})

"""DeepSeek-V2 and V3 against transformers; published sizes and caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

import landmark
from landmark.ctx import Bounds
from landmark.models.inspect import figures
from landmark.models.registry import family_of, sizes
from landmark.weights.checkpoint import describe

from .families import check_decoder

SHAPE: dict[str, Any] = dict(
    vocab_size=97, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=64, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8,
    qk_nope_head_dim=12, v_head_dim=20, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=24,
    first_k_dense_replace=1, n_shared_experts=2, routed_scaling_factor=1.7,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.9,
    beta_fast=32, beta_slow=1,
)  # fmt: skip
V2: dict[str, dict[str, Any]] = {
    "plain": {},
    "no query compression": dict(q_lora_rank=None),
    "groups": dict(topk_method="group_limited_greedy", n_group=4, topk_group=2),
    "yarn": dict(rope_parameters=YARN, max_position_embeddings=64),
    "biases, tied": dict(attention_bias=True, tie_word_embeddings=True),
    "all sparse": dict(first_k_dense_replace=0),
}
V3: dict[str, dict[str, Any]] = {
    "plain": dict(n_group=4, topk_group=2),
    "one group, not renormalised": dict(n_group=1, topk_group=1, norm_topk_prob=False),
    "half-split rotary": dict(n_group=4, topk_group=2, rope_interleave=False),
    "yarn": dict(n_group=4, topk_group=2, rope_parameters=YARN),
    "no query compression": dict(n_group=2, topk_group=1, q_lora_rank=None),
}


@pytest.mark.parametrize("variant", V2.values(), ids=V2)
def test_v2(variant: dict[str, Any], tmp_path: Path) -> None:
    check_decoder(DeepseekV2Config(**{**SHAPE, **variant}), DeepseekV2ForCausalLM, tmp_path)


@pytest.mark.parametrize("variant", V3.values(), ids=V3)
def test_v3(variant: dict[str, Any], tmp_path: Path) -> None:
    check_decoder(DeepseekV3Config(**{**SHAPE, **variant}), DeepseekV3ForCausalLM, tmp_path)


class V1(LlamaForCausalLM):
    """The authors' code is not in transformers: Llama with the experts of V2, saved in the authors' layout."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers[1:]:
            layer.mlp = DeepseekV2Moe(config)
            for p in layer.mlp.parameters():
                torch.nn.init.normal_(p, std=0.02)

    def save_pretrained(self, directory: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self.state_dict().items():
            stem, fused, _ = name.partition("gate_up_proj")
            if fused:
                for e, (gate, up) in enumerate(each.chunk(2) for each in tensor):
                    tensors |= {f"{stem}{e}.gate_proj.weight": gate.clone(), f"{stem}{e}.up_proj.weight": up.clone()}
            elif name.endswith("experts.down_proj"):
                stem = name.removesuffix("down_proj")
                tensors |= {f"{stem}{e}.down_proj.weight": each.clone() for e, each in enumerate(tensor)}
            else:
                tensors[name] = tensor.clone()
        save_file(tensors, Path(directory) / "model.safetensors", metadata={"format": "pt"})
        hf = {**SHAPE_V1, "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "dtype": "float32"}
        (Path(directory) / "config.json").write_text(json.dumps(hf))


MLA = {"kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "routed_scaling_factor"}
SHAPE_V1 = {key: value for key, value in SHAPE.items() if key not in MLA} | {"rms_norm_eps": 1e-6, "rope_theta": 1e4}


def test_v1(tmp_path: Path) -> None:
    more = dict(routed_scaling_factor=1.0, topk_method="greedy", n_group=1, topk_group=1, num_experts=8)
    check_decoder(LlamaConfig(**SHAPE_V1, **more, mlp_bias=False), V1, tmp_path)


HUB: dict[str, dict[str, Any]] = {  # what the files on the hub say besides
    "deepseek-v3": {
        "attention_bias": False, "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_deepseek"},
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "hidden_act": "silu", "initializer_range": 0.02,
        "moe_layer_freq": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "use_cache": True,
    },
    "deepseek-v2": {
        "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.003, "seq_aux": True, "ep_size": 1,
        "auto_map": {"AutoConfig": "configuration_deepseek"}, "hidden_act": "silu", "moe_layer_freq": 1,
        "norm_topk_prob": False, "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "scoring_func": "softmax", "use_cache": True,
    },
    "deepseek-moe-16b": {
        "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "seq_aux": True,
        "auto_map": {"AutoConfig": "configuration_deepseek"}, "hidden_act": "silu", "moe_layer_freq": 1,
        "pretraining_tp": 1, "rope_scaling": None, "scoring_func": "softmax", "use_cache": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_files_of_the_hub(name: str) -> None:
    family, hf = sizes()[name]
    assert family_of(hf) is family and family.read({**hf, **HUB[name]}) == family.read(hf)


def test_what_would_change_the_numbers() -> None:
    v2 = {"architectures": ["DeepseekV2ForCausalLM"], **SHAPE}
    for key, value in (("norm_topk_prob", True), ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        with pytest.raises(ValueError, match=key):
            landmark.build({**v2, key: value})
    v3 = {"architectures": ["DeepseekV3ForCausalLM"], **SHAPE, "n_group": 3, "topk_group": 1}
    with pytest.raises(ValueError, match="groups"):
        landmark.build(v3)


def test_absorbed_is_expanded() -> None:
    """In float64, one token at a time from the latent equals keys and values of every head."""
    torch.manual_seed(0)
    model: Any = landmark.build({"architectures": ["DeepseekV3ForCausalLM"], **SHAPE, "n_group": 4, "topk_group": 2})
    model = model.double().eval()
    tokens = torch.randint(0, 97, (2, 30))
    with torch.no_grad():
        full = model(tokens)
        state = model.new_state(2, 30)
        parts = [model(tokens[:, :7], state=state), *(model(tokens[:, t : t + 1], state=state) for t in range(7, 30))]
        torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-10, atol=1e-12)
        many = model.new_state(2, 30)  # a past, and then more than it pays to absorb
        for module in model.modules():
            if hasattr(module, "many"):
                module.many = 4
        flat = torch.cat([tokens[0, :9], tokens[1, :2]])[None]
        model(flat, bounds=Bounds.of_lengths((9, 2)), state=many)
        rest = torch.cat([tokens[0, 9:], tokens[1, 2:]])[None]
        out = model(rest, bounds=Bounds.of_lengths((21, 28)), state=many)
        torch.testing.assert_close(out[0, :21], full[0, 9:], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(out[0, 21:], full[1, 2:], rtol=1e-10, atol=1e-12)


def meta(name: str) -> Any:
    with torch.device("meta"):
        return describe(name)[0].build()


def test_published_figures() -> None:
    """A token looks one row of the embedding up; what it passes is counted without that table."""
    v3, v2, lite, first = (
        figures(meta(name)) for name in ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "deepseek-moe-16b")
    )

    def passed(found: Any) -> float:
        return (found.active - found.embedding / 2) / 1e9

    assert v3.parameters == 671_026_404_352 and round(passed(v3)) == 37
    assert v3.cache_per_token == 70_272
    assert round(v2.parameters / 1e9) == 236 and round(passed(v2)) == 21
    assert round(lite.parameters / 1e9, 1) == 15.7 and round(passed(lite), 2) == 2.45  # the paper's 2.4 is cut off
    assert round(first.parameters / 1e9, 1) == 16.4 and round(first.active / 1e9, 1) == 2.8  # here it is in


def test_the_cache_of_v2_is_93_percent_smaller_than_that_of_67b() -> None:
    dense, latent = figures(meta("deepseek-67b")), figures(meta("deepseek-v2"))
    assert dense.cache_per_token is not None and latent.cache_per_token is not None
    # The paper counts V2's cache in its deployment, 6 bits a number (sec. 3.2.3); the 67 B model's in 16.
    saved = 1 - latent.cache_per_token * 6 / 16 / dense.cache_per_token
    assert round(100 * saved, 1) == 93.3

"""DeepSeekMoE (2024): many narrow experts, and shared ones. DeepSeek-V2 (2024) adds latent attention, DeepSeek-V3
(2024), the shape of DeepSeek-R1 (2025), modules that foretell further tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from ..config import ModelConfig, ModuleConfig
from ..nn.latent import LatentAttention
from ..nn.moe import MoE
from ..nn.mtp import SequentialDrafts
from ..nn.rope_scaling import YaRN, yarn_mscale
from ..nn.router import RouterConfig, SigmoidTopK, SoftmaxTopK
from ..weights.rules import Copy, Rename, Rule
from .decoder import Decoder
from .llama import NORMS, attention, decoder, glu, pre_norm, rms_norm, size
from .llama import rules as llama_rules
from .moe_keys import expert_rules
from .registry import Family, Keys, register
from .rope_keys import rope


def latent(keys: Keys, *, interleaved: bool) -> LatentAttention.Config:
    rope_dim, head_dim = keys.get("qk_rope_head_dim", 64), keys.get("qk_nope_head_dim", 128)
    turning = rope(keys, rope_dim, interleaved=interleaved)
    scale = (head_dim + rope_dim) ** -0.5
    if isinstance(turning.scaling, YaRN) and turning.scaling.mscale_all:
        scale *= yarn_mscale(turning.scaling.factor, turning.scaling.mscale_all) ** 2
    keys.inert("num_key_value_heads", "head_dim", "qk_head_dim")
    return LatentAttention.Config(
        heads=keys["num_attention_heads"], kv_rank=keys.get("kv_lora_rank", 512),
        q_rank=keys.nullable("q_lora_rank", 1536),
        head_dim=head_dim, rope_dim=rope_dim, v_dim=keys.get("v_head_dim", 128), rope=turning,
        bias=keys.get("attention_bias", False), scale=scale, dropout=keys.get("attention_dropout", 0.0),
    )  # fmt: skip


def model(keys: Keys, attn: ModuleConfig, router: RouterConfig, first_dense: int) -> Decoder.Config:
    """The first layers are dense; the others have experts, and shared ones as one feed-forward."""
    norm, dense, hidden = rms_norm(keys), glu(keys), keys["moe_intermediate_size"]
    shared = keys.get("n_shared_experts", 0)
    experts = MoE.Config(
        experts=keys["n_routed_experts"], active=keys["num_experts_per_tok"], hidden=hidden, act=dense.act,
        router=router, shared=type(dense)(hidden=shared * hidden, act=dense.act) if shared else None,
    )  # fmt: skip
    keys.fixed("moe_layer_freq", 1)
    keys.inert("pretraining_tp", "aux_loss_alpha", "seq_aux", "ep_size", "output_router_logits", "auto_map")
    layers = [pre_norm(attn, dense if i < first_dense else experts, norm) for i in range(keys["num_hidden_layers"])]
    whole, depth = decoder(keys, layers), keys.get("num_nextn_predict_layers", keys.get("num_mtp_layers", 0))
    if not depth:
        return whole
    drafts = SequentialDrafts.Config(depth=depth, layer=pre_norm(attn, experts, norm), norm=norm)
    return dataclasses.replace(whole, drafts=drafts)


def config_v1(keys: Keys) -> Decoder.Config:
    keys.fixed("scoring_func", "softmax")
    router = SoftmaxTopK.Config(renormalise=keys.get("norm_topk_prob", False))
    bias = keys.get("attention_bias", False)
    attn = attention(keys, bias=bias, out_bias=bias)
    return model(keys, attn, router, keys.get("first_k_dense_replace", 0))


def config_v2(keys: Keys) -> Decoder.Config:
    method = keys.get("topk_method", "greedy")
    keys.fixed("topk_method", "greedy", "group_limited_greedy")
    keys.fixed("scoring_func", "softmax")
    keys.fixed("mlp_bias", False)
    limited = method == "group_limited_greedy"
    groups, active_groups = keys.get("n_group", 1), keys.get("topk_group", 1)
    keys.fixed("norm_topk_prob", False)  # the authors' code and transformers' differ where it is on
    router = SoftmaxTopK.Config(
        renormalise=False, scale=float(keys.get("routed_scaling_factor", 1.0)),
        groups=groups if limited else 1, active_groups=active_groups if limited else 1,
    )  # fmt: skip
    return model(keys, latent(keys, interleaved=True), router, keys.get("first_k_dense_replace", 0))


def config_v3(keys: Keys) -> Decoder.Config:
    keys.fixed("topk_method", "noaux_tc")
    keys.fixed("scoring_func", "sigmoid")
    router = SigmoidTopK.Config(
        renormalise=keys.get("norm_topk_prob", True), scale=float(keys.get("routed_scaling_factor", 2.5)),
        groups=keys.get("n_group", 8), active_groups=keys.get("topk_group", 4),
    )  # fmt: skip
    interleaved = keys.get("rope_interleave", True)
    return model(keys, latent(keys, interleaved=interleaved), router, keys.get("first_k_dense_replace", 3))


def fitted(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Files may lack the modules that foretell further tokens, whatever config.json says."""
    assert isinstance(config, Decoder.Config)
    there = any(name.endswith(".eh_proj.weight") for name in names)
    return config if there or config.drafts is None else dataclasses.replace(config, drafts=None)


def layer_rules(keys: Keys, theirs: str, ours: str) -> list[Rule]:
    """One layer, or with {i} every one."""
    names = {
        "self_attn.q_proj": "attn.fn.q", "self_attn.q_a_proj": "attn.fn.q_down",
        "self_attn.q_a_layernorm": "attn.fn.q_norm", "self_attn.q_b_proj": "attn.fn.q_up",
        "self_attn.kv_a_proj_with_mqa": "attn.fn.kv_down", "self_attn.kv_a_layernorm": "attn.fn.kv_norm",
        "self_attn.kv_b_proj": "attn.fn.kv_up", "self_attn.o_proj": "attn.fn.out", **NORMS,
        **{f"mlp.shared_experts.{name}_proj": f"ffn.fn.shared.{name}" for name in ("gate", "up", "down")},
        **{f"mlp.{name}_proj": f"ffn.fn.{name}" for name in ("gate", "up", "down")},
    }  # fmt: skip
    return [
        *(Rename(f"{theirs}{name}.", f"{ours}{own}.") for name, own in names.items()),
        Rename(f"{theirs}mlp.gate.e_score_correction_bias", f"{ours}ffn.fn.router.bias"),
        *expert_rules(keys["n_routed_experts"], theirs=f"{theirs}mlp.", ours=f"{ours}ffn.fn."),
    ]


def rules(keys: Keys) -> list[Rule]:
    found: list[Rule] = []
    for k in range(keys.get("num_nextn_predict_layers", keys.get("num_mtp_layers", 0))):
        theirs, ours = f"model.layers.{keys['num_hidden_layers'] + k}.", f"drafts.steps.{k}."
        names = {"enorm": "embed_norm", "hnorm": "hidden_norm", "eh_proj": "project", "shared_head.norm": "norm"}
        table, there = "model.embed_tokens.weight", f"{theirs}eh_proj.weight"
        head = table if keys.get("tie_word_embeddings", False) else "lm_head.weight"
        found += [
            Copy(f"{theirs}embed_tokens.weight", same_as=table, beside=there),
            Copy(f"{theirs}shared_head.head.weight", same_as=head, beside=there),
            *(Rename(f"{theirs}{name}.", f"{ours}{own}.") for name, own in names.items()),
            *layer_rules(keys, theirs, f"{ours}layer."),
        ]
    return [*found, *layer_rules(keys, "model.layers.{i}.", "layers.{i}."), *llama_rules(keys)]


def published(mscale: float | None = None, **own: Any) -> dict[str, Any]:
    """What files on the hub say; `mscale`, where positions are stretched, is the weight of that on the attention."""
    usual = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False, **own}
    if mscale is None:
        return usual
    yarn = {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": mscale, "mscale_all_dim": mscale,
    }  # fmt: skip
    return {**usual, "kv_lora_rank": 512, "max_position_embeddings": 163840, "rope_scaling": yarn}


V1 = published(
    model_type="deepseek", vocab_size=102400, max_position_embeddings=4096, first_k_dense_replace=1,
    n_shared_experts=2, n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=1408, norm_topk_prob=False,
)  # fmt: skip
V2 = published(
    0.707,
    model_type="deepseek_v2", vocab_size=102400, first_k_dense_replace=1, n_shared_experts=2,
    num_experts_per_tok=6,
)  # fmt: skip
V3 = published(
    1.0,
    model_type="deepseek_v3", vocab_size=129280, first_k_dense_replace=3,
    n_shared_experts=1, n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, q_lora_rank=1536,
    n_group=8, topk_group=4, routed_scaling_factor=2.5, norm_topk_prob=True,
)  # fmt: skip
SIZES_V1 = {"deepseek-moe-16b": size(2048, 10944, 28, 16, 16, **V1)}
SIZES_V2 = {
    "deepseek-v2": size(
        5120, 12288, 60, 128, 128, **V2, n_routed_experts=160, moe_intermediate_size=1536, q_lora_rank=1536,
        topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0,
    ),
    "deepseek-v2-lite": size(
        2048, 10944, 27, 16, 16, **V2, n_routed_experts=64, moe_intermediate_size=1408, q_lora_rank=None,
        topk_method="greedy", routed_scaling_factor=1.0,
    ),
}  # fmt: skip
SIZES_V3 = {name: size(7168, 18432, 61, 128, 128, **V3) for name in ("deepseek-v3", "deepseek-r1")}
register(
    Family(
        name="deepseek", architectures=("DeepseekForCausalLM",), config=config_v1, rules=rules, prefix="model.",
        sizes=SIZES_V1,
    )
)  # fmt: skip
register(
    Family(
        name="deepseek_v2", architectures=("DeepseekV2ForCausalLM",), config=config_v2, rules=rules, prefix="model.",
        sizes=SIZES_V2,
    )
)  # fmt: skip
register(
    Family(
        name="deepseek_v3", architectures=("DeepseekV3ForCausalLM",), config=config_v3, rules=rules, prefix="model.",
        sizes=SIZES_V3, fitted=fitted,
    )
)  # fmt: skip

"""Qwen3-MoE (Qwen team 2025): Qwen3 whose feed-forwards are 128 narrow experts, of which a token passes eight."""

from __future__ import annotations

from typing import Any

from ..nn.attention import HeadNorm
from ..nn.moe import MoE
from ..nn.router import SoftmaxTopK
from ..weights.rules import Rule
from .decoder import Decoder
from .llama import attention, decoder, glu, pre_norm, rms_norm, size
from .llama import rules as llama_rules
from .moe_keys import balance, expert_rules
from .registry import Family, Keys, register


def sparse_layers(keys: Keys) -> list[bool]:
    """Which layers have experts: every `decoder_sparse_step`-th, counted from the end of a step, unless listed."""
    step, dense = keys.get("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    depth = keys["num_hidden_layers"]
    if step < 1 or any(not 0 <= layer < depth for layer in dense):
        raise ValueError(
            f"config.json: decoder_sparse_step = {step} and mlp_only_layers = {dense} must fit {depth} layers"
        )
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(depth)]


def config(keys: Keys) -> Decoder.Config:
    bias, norm, active = keys.get("attention_bias", False), rms_norm(keys), keys.get("num_experts_per_tok", 8)
    window = keys.nullable("sliding_window", 4096) if keys.get("use_sliding_window", False) else None
    keys.inert("sliding_window", "max_window_layers")
    # Older files leave head_dim out where it is dim / heads.
    attn = attention(keys, qk_norm=HeadNorm.Config(norm=norm), bias=bias, out_bias=bias, window=window)
    sparse = sparse_layers(keys)
    experts = MoE.Config(
        experts=keys["num_experts"] if "num_experts" in keys.hf else keys["num_local_experts"],
        active=active,
        hidden=keys["moe_intermediate_size"],
        act=keys.activation(),
        router=SoftmaxTopK.Config(
            renormalise=keys.get("norm_topk_prob", False), balance=balance(keys, active, sum(sparse))
        ),
    )
    keys.inert("intermediate_size")
    dense = None if all(sparse) else glu(keys)
    return decoder(keys, [pre_norm(attn, experts if is_sparse else dense or experts, norm) for is_sparse in sparse])


def rules(keys: Keys) -> list[Rule]:
    experts = keys["num_experts"] if "num_experts" in keys.hf else keys["num_local_experts"]
    return [*llama_rules(keys), *expert_rules(experts)]


def published(**own: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe", "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "tie_word_embeddings": False, **own,
    }  # fmt: skip


SIZES = {
    "qwen3-30b-a3b": size(2048, 6144, 48, 32, 4, **published(moe_intermediate_size=768)),
    "qwen3-235b-a22b": size(4096, 12288, 94, 64, 4, **published(moe_intermediate_size=1536)),
}
register(
    Family(
        name="qwen3_moe",
        architectures=("Qwen3MoeForCausalLM",),
        config=config,
        rules=rules,
        prefix="model.",
        sizes=SIZES,
    )
)

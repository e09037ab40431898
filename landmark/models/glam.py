"""GLaM (Du et al. 2021): every other layer has 64 experts in place of its feed-forward, of which a token passes two.

GLaM was never published, so its config.json is ours, with the keys of Qwen3-MoE and a `capacity_factor`, and so is the
layout of its tensors. Experts are plain perceptrons with GELU, dense layers GEGLU; embeddings are tied (sec. 4). Its
relative position bias (Dai et al. 2019) is replaced by rotary positions, and its norms by RMSNorm.
"""

from __future__ import annotations

from typing import Any

from ..nn.moe import MoE
from ..nn.router_capacity import GShard
from ..weights.rules import Rule
from . import llama
from .decoder import Decoder
from .llama import attention, decoder, glu, pre_norm, rms_norm
from .moe_keys import expert_rules
from .registry import Family, Keys, register


def config(keys: Keys) -> Decoder.Config:
    keys.fixed("decoder_sparse_step", 2)
    capacity, balance = keys.get("capacity_factor", 1.25), keys.get("router_aux_loss_coef", 0.01)
    experts = MoE.Config(
        experts=keys.get("num_experts", 64),
        active=keys.get("num_experts_per_tok", 2),
        hidden=keys["intermediate_size"],
        act=keys.activation(default="gelu"),
        gated=False,
        router=GShard.Config(capacity_factor=capacity, balance=balance),
    )
    attn, norm = attention(keys, head_dim=128), rms_norm(keys)
    pair = [pre_norm(attn, glu(keys), norm), pre_norm(attn, experts, norm)]
    return decoder(keys, [pair[layer % 2] for layer in range(keys["num_hidden_layers"])], tied=True)


def rules(keys: Keys) -> list[Rule]:
    names = {"up_proj": "up", "down_proj": "down"}
    return [*llama.rules(keys, tied=True), *expert_rules(keys.get("num_experts", 64), names=names)]


def size(dim: int, layers: int, heads: int) -> dict[str, Any]:
    """Table 4 and sec. 4; the vocabulary is of 256 thousand pieces, texts of 1024 tokens."""
    return llama.size(dim, 4 * dim, layers, heads, heads, head_dim=128) | {
        "model_type": "glam", "hidden_act": "gelu", "vocab_size": 256000, "max_position_embeddings": 1024,
    }  # fmt: skip


register(
    Family(
        name="glam",
        architectures=("GLaMForCausalLM",),
        config=config,
        rules=rules,
        prefix="model.",
        sizes={"glam-64b-64e": size(8192, 64, 128)},
    )
)

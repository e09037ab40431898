"""Mixtral (Jiang et al. 2024): Mistral with eight experts for each feed-forward, of which a token passes two."""

from __future__ import annotations

from ..nn.moe import MoE
from ..nn.router import SoftmaxTopK
from ..weights.rules import Rule
from .decoder import Decoder
from .llama import attention, decoder, pre_norm, rms_norm, size
from .llama import rules as llama_rules
from .moe_keys import balance, expert_rules
from .registry import Family, Keys, register


def config(keys: Keys) -> Decoder.Config:
    depth, active = keys["num_hidden_layers"], keys.get("num_experts_per_tok", 2)
    keys.fixed("router_jitter_noise", 0, 0.0, None)
    experts = MoE.Config(
        experts=keys.get("num_local_experts", 8),
        active=active,
        hidden=keys["intermediate_size"],
        act=keys.activation(),
        router=SoftmaxTopK.Config(balance=balance(keys, active, depth)),
    )
    layer = pre_norm(attention(keys, window=keys.nullable("sliding_window", None)), experts, rms_norm(keys))
    return decoder(keys, [layer] * depth)


def rules(keys: Keys) -> list[Rule]:
    names = {"w1": "gate", "w3": "up", "w2": "down"}
    theirs = "model.layers.{i}.block_sparse_moe."
    return [*llama_rules(keys), *expert_rules(keys.get("num_local_experts", 8), theirs=theirs, names=names)]


COMMON = {
    "model_type": "mixtral", "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
SIZES = {
    "mixtral-8x7b": size(4096, 14336, 32, 32, 8, **COMMON, vocab_size=32000, max_position_embeddings=32768),
    "mixtral-8x22b": size(6144, 16384, 56, 48, 8, **COMMON, vocab_size=32768, max_position_embeddings=65536),
}
register(
    Family(
        name="mixtral",
        architectures=("MixtralForCausalLM",),
        config=config,
        rules=rules,
        prefix="model.",
        sizes=SIZES,
    )
)

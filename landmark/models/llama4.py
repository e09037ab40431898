"""Llama 4, its text model (Meta 2025): of four layers three see a chunk of the text through rotary attention, and one
all of it without positions; a token passes one expert of many and one that all share."""

from __future__ import annotations

from typing import Any

from ..nn.attention import Attention, HeadNorm, LogTemperature
from ..nn.feedforward import GLU
from ..nn.moe import MoE
from ..nn.norm import UnitRMSNorm
from ..nn.router import SigmoidInput
from ..weights.rules import Rename, Rule, SplitStack, Transpose
from .decoder import Decoder
from .llama import attention, decoder, pre_norm, rms_norm, size
from .llama import rules as llama_rules
from .moe_keys import FFN, PROJECTIONS, balance
from .registry import Family, Keys, register
from .rope_keys import rope

ROTARY, EVERYWHERE = "chunked_attention", "full_attention"


def config(keys: Keys) -> Decoder.Config:
    keys.fixed("router_jitter_noise", 0, 0.0, None)
    depth, act, norm = keys["num_hidden_layers"], keys.activation(), rms_norm(keys)
    rotary, sparse, active = rotary_layers(keys), sparse_layers(keys), keys.get("num_experts_per_tok", 1)
    experts = MoE.Config(
        experts=keys["num_local_experts"],
        active=active,
        hidden=keys["intermediate_size"],
        act=act,
        router=SigmoidInput.Config(balance=balance(keys, active, len(sparse))),
        shared=GLU.Config(hidden=keys["intermediate_size"], act=act),
    )
    dense = GLU.Config(hidden=keys["intermediate_size_mlp"], act=act)
    near, far = near_attention(keys), far_attention(keys)
    return decoder(
        keys,
        [pre_norm(near if rotary[i] else far, experts if i in sparse else dense, norm) for i in range(depth)],
    )


def near_attention(keys: Keys) -> Attention.Config:
    """Within chunks, with rotary positions, and with a norm on queries and keys if `use_qk_norm`."""
    eps, bias = keys.get("rms_norm_eps", 1e-5), keys.get("attention_bias", False)
    qk_norm = HeadNorm.Config(norm=UnitRMSNorm.Config(eps=eps)) if keys.get("use_qk_norm", True) else None
    head_dim = keys.get("head_dim") or keys.quotient("hidden_size", "num_attention_heads")
    turn = rope(keys, head_dim, theta=5e5, interleaved=True)
    chunk = keys.nullable("attention_chunk_size", 8192)
    return attention(keys, rope=turn, qk_norm=qk_norm, chunk=chunk, bias=bias, out_bias=bias)


def far_attention(keys: Keys) -> Attention.Config:
    """Over the whole text, without positions."""
    temperature = LogTemperature(floor=int(keys.get("floor_scale", 8192)), scale=keys.get("attn_scale", 0.1))
    tuned, bias = bool(keys.get("attn_temperature_tuning", True)), keys.get("attention_bias", False)
    return attention(keys, rope=None, temperature=temperature if tuned else None, bias=bias, out_bias=bias)


def rotary_layers(keys: Keys) -> list[bool]:
    """`no_rope_layers` has a 1 for every layer with rotary positions; without it, every fourth has none."""
    depth, step = keys["num_hidden_layers"], keys.get("no_rope_layer_interval", 4)
    rotary = list(map(bool, keys.get("no_rope_layers") or [(i + 1) % step for i in range(depth)]))
    if len(rotary) != depth:
        raise ValueError(f"config.json: no_rope_layers names {len(rotary)} layers, but num_hidden_layers is {depth}")
    keys.fixed("layer_types", [ROTARY if turns else EVERYWHERE for turns in rotary], None)
    return rotary


def sparse_layers(keys: Keys) -> list[int]:
    """`moe_layers`; without it, the last of every `interleave_moe_layer_step` layers."""
    depth, step = keys["num_hidden_layers"], keys.get("interleave_moe_layer_step", 1)
    sparse: list[int] = keys.nullable("moe_layers", None)
    if sparse is None:
        sparse = list(range(step - 1, depth, step))
    if wrong := [i for i in sparse if not 0 <= i < depth]:
        raise ValueError(f"config.json: moe_layers has {wrong[0]}, but num_hidden_layers is {depth}")
    return sparse


def rules(keys: Keys) -> list[Rule]:
    theirs, hidden = "model.layers.{i}.feed_forward.", keys["intermediate_size"]
    return [
        SplitStack(
            theirs + "experts.gate_up_proj", [FFN + f"experts.{x}.weight" for x in ("gate", "up")], [hidden] * 2
        ),
        Transpose(theirs + "experts.down_proj", FFN + "experts.down.weight"),
        Rename(theirs + "router.weight", FFN + "router.linear.weight"),
        *(Rename(f"{theirs}shared_expert.{name}.", f"{FFN}shared.{own}.") for name, own in PROJECTIONS.items()),
        *(Rename(f"{theirs}{name}.", f"{FFN}{own}.") for name, own in PROJECTIONS.items()),
        *llama_rules(keys),
    ]


def published(experts: int, context: int, **own: Any) -> dict[str, Any]:
    return size(5120, 8192, 48, 40, 8, num_local_experts=experts, max_position_embeddings=context) | {
        "model_type": "llama4_text", "vocab_size": 202048, "head_dim": 128, "intermediate_size_mlp": 16384,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "num_experts_per_tok": 1, "attention_chunk_size": 8192, **own,
    }  # fmt: skip


BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 8192}
SIZES = {
    "llama4-scout": published(16, 10485760, rope_scaling={"rope_type": "llama3", "factor": 16.0, **BANDS}),
    "llama4-maverick": published(128, 1048576, interleave_moe_layer_step=2, use_qk_norm=False),
}
register(
    Family(
        name="llama4_text",
        architectures=("Llama4ForCausalLM",),
        config=config,
        rules=rules,
        prefix="model.",
        sizes=SIZES,
    )
)

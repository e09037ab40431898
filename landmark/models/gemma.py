"""Gemma (2024): GEGLU, wide heads, a scaled embedding. Gemma 2: norms on both sides, soft caps, every other layer
local. Gemma 3 (2025, text): a norm on queries and keys instead of caps, five local layers for every global one."""

from __future__ import annotations

import math
from typing import Any

from ..nn.attention import Attention, HeadNorm
from ..nn.feedforward import GLU
from ..nn.residual import Layer, Sandwich
from ..ops.activation import Activation
from ..weights.rules import Rule
from . import llama
from .decoder import Decoder
from .layer_keys import FULL, SLIDING, layer_types
from .llama import attention, pre_norm, rms_norm, size
from .registry import Family, Keys, register
from .rope_keys import rope

SANDWICH = {
    "input_layernorm": "attn.norm", "post_attention_layernorm": "attn.post",
    "pre_feedforward_layernorm": "ffn.norm", "post_feedforward_layernorm": "ffn.post",
}  # fmt: skip


def gemma(keys: Keys) -> Decoder.Config:
    layer = pre_norm(attend(keys), geglu(keys), rms_norm(keys, offset=1.0))
    return decoder(keys, [layer] * keys["num_hidden_layers"])


def gemma2(keys: Keys) -> Decoder.Config:
    window, cap = keys.nullable("sliding_window", 4096), keys.nullable("attn_logit_softcapping", 50.0)
    keys.fixed("sliding_window_size", None, window)
    types = layer_types(keys, window, lambda i: i % 2 == 0)
    layers = {
        kind: sandwich(keys, attend(keys, window=width, softcap=cap, scale=query_scale(keys)))
        for kind, width in ((FULL, None), (SLIDING, window))
    }
    return decoder(keys, [layers[kind] for kind in types], softcap=keys.nullable("final_logit_softcapping", 30.0))


def gemma3(keys: Keys) -> Decoder.Config:
    keys.fixed("attn_logit_softcapping", None)
    window, every = keys.nullable("sliding_window", 4096), keys.get("sliding_window_pattern", 6)
    keys.inert("_sliding_window_pattern")
    types = layer_types(keys, window, lambda i: (i + 1) % every != 0)
    norm, head_dim = HeadNorm.Config(norm=rms_norm(keys, offset=1.0)), keys.get("head_dim", 256)
    turns = {FULL: rope(keys, head_dim, theta=1e6, layer_type=FULL), SLIDING: rope(local(keys), head_dim)}
    layers = {
        kind: sandwich(keys, attend(keys, window=width, rope=turns[kind], qk_norm=norm, scale=query_scale(keys)))
        for kind, width in ((FULL, None), (SLIDING, window))
    }
    return decoder(keys, [layers[kind] for kind in types], softcap=keys.get("final_logit_softcapping"))


def attend(keys: Keys, **own: Any) -> Attention.Config:
    keys.fixed("use_bidirectional_attention", None, False)
    bias = keys.get("attention_bias", False)
    return attention(keys, head_dim=256, bias=bias, out_bias=bias, **own)


def query_scale(keys: Keys) -> float:
    return float(keys.get("query_pre_attn_scalar", 256) ** -0.5)


def local(keys: Keys) -> Keys:
    """The keys that say how local layers rotate: a base of their own, and never stretched."""
    values = keys.get("rope_parameters", {}).get(SLIDING) or {}
    theta = keys.get("rope_local_base_freq", 10_000.0)
    context = keys.get("max_position_embeddings")
    return Keys({"rope_parameters": {"rope_theta": theta, **values}, "max_position_embeddings": context})


def geglu(keys: Keys) -> GLU.Config:
    """The first files say "gelu" and mean its tanh approximation; `hidden_activation`, where given, says it again."""
    said: dict[str, Activation] = {
        key: keys.activation(key) for key in ("hidden_act", "hidden_activation") if keys.get(key) is not None
    }
    if said.get("hidden_act") == "gelu":
        said["hidden_act"] = "gelu_tanh"
    if len(set(said.values())) > 1:
        both = " and ".join(f"{key} {keys.hf[key]!r}" for key in said)
        raise ValueError(f"config.json: {both} disagree; remove the one that is not meant")
    return GLU.Config(hidden=keys["intermediate_size"], act=next(iter(said.values()), "gelu_tanh"))


def sandwich(keys: Keys, attn: Attention.Config) -> Layer:
    norm = rms_norm(keys, offset=1.0)
    return {
        "attn": Sandwich.Config(fn=attn, norm=norm, post=norm),
        "ffn": Sandwich.Config(fn=geglu(keys), norm=norm, post=norm),
    }


def decoder(keys: Keys, layers: list[Layer], *, softcap: float | None = None) -> Decoder.Config:
    scale, norm = math.sqrt(keys["hidden_size"]), rms_norm(keys, offset=1.0)
    return llama.decoder(keys, layers, norm=norm, tied=True, scale=scale, softcap=softcap)


def pre_norm_rules(keys: Keys) -> list[Rule]:
    return llama.rules(keys, tied=True)


def sandwich_rules(keys: Keys) -> list[Rule]:
    return llama.rules(keys, norms=SANDWICH, tied=True)


COMMON = {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}
G1 = COMMON | {"model_type": "gemma", "vocab_size": 256000, "max_position_embeddings": 8192, "head_dim": 256}
G1 |= {"hidden_act": "gelu_pytorch_tanh", "rope_theta": 1e4}
G2 = G1 | {"model_type": "gemma2", "sliding_window": 4096, "query_pre_attn_scalar": 256}
G2 |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
G3 = COMMON | {"model_type": "gemma3_text", "vocab_size": 262144, "max_position_embeddings": 32768, "head_dim": 256}
G3 |= {"sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256}
G3 |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
G3L = G3 | {"vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window": 1024}
G3L |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
NARROW2, NARROW3 = {"head_dim": 128, "query_pre_attn_scalar": 144}, {"head_dim": 128, "query_pre_attn_scalar": 168}

GEMMA = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    config=gemma,
    rules=pre_norm_rules,
    prefix="model.",
    sizes={"gemma-2b": size(2048, 16384, 18, 8, 1, **G1), "gemma-7b": size(3072, 24576, 28, 16, 16, **G1)},
)
GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    config=gemma2,
    rules=sandwich_rules,
    prefix="model.",
    sizes={
        "gemma2-2b": size(2304, 9216, 26, 8, 4, **G2),
        "gemma2-9b": size(3584, 14336, 42, 16, 8, **G2),
        "gemma2-27b": size(4608, 36864, 46, 32, 16, **G2 | NARROW2),
    },
)
GEMMA3 = Family(
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    config=gemma3,
    rules=sandwich_rules,
    prefix="model.",
    sizes={
        "gemma3-270m": size(640, 2048, 18, 4, 1, **G3),
        "gemma3-1b": size(1152, 6912, 26, 4, 1, **G3),
        "gemma3-4b": size(2560, 10240, 34, 8, 4, **G3L),
        "gemma3-12b": size(3840, 15360, 48, 16, 8, **G3L),
        "gemma3-27b": size(5376, 21504, 62, 32, 16, **G3L | NARROW3),
    },
)
for family in (GEMMA, GEMMA2, GEMMA3):
    register(family)

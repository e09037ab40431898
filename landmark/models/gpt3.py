"""GPT-3 (Brown et al. 2020): GPT-2 with a context of 2048 and layers that alternate between dense and locally banded
attention (sec. 2.1). GPT-Neo (Black et al. 2021) is its open replica: no biases on q, k, v, and scores not scaled.

GPT-3 itself was never published, so its config.json is ours: GPT-2's keys and `attention_window`, the width of the
band of every second layer (null: all layers dense). Its tensors are laid out as GPT-2's.
"""

from __future__ import annotations

from typing import Any

from ..config import nearest
from ..nn.attention import Attention
from ..nn.feedforward import MLP
from ..nn.residual import Layer, PreNorm
from ..weights.rules import Drop, Rename, Rule
from . import gpt1, gpt2
from .decoder import Decoder
from .gpt1 import layer_norm, outer_rules
from .registry import Family, Keys, register

GLOBAL, LOCAL = "global", "local"


def config(keys: Keys) -> Decoder.Config:
    window = keys.nullable("attention_window", 256)
    return gpt2.decoder(keys, [window if i % 2 else None for i in range(keys["n_layer"])])


def gpt_neo(keys: Keys) -> Decoder.Config:
    layers = {GLOBAL: neo_layer(keys, None), LOCAL: neo_layer(keys, keys.get("window_size", 256))}
    return gpt1.decoder(
        keys, [layers[kind] for kind in kinds(keys)], dim=keys["hidden_size"],
        context=keys.get("max_position_embeddings", 2048), norm=layer_norm(keys),
        dropout=keys.get("embed_dropout", 0.0),
    )  # fmt: skip


def neo_layer(keys: Keys, window: int | None) -> Layer:
    heads, norm, dropout = keys["num_heads"], layer_norm(keys), keys.get("resid_dropout", 0.0)
    attn = Attention.Config(
        heads=heads, kv_heads=heads, head_dim=keys.quotient("hidden_size", "num_heads"), out_bias=True, scale=1.0,
        window=window, dropout=keys.get("attention_dropout", 0.0),
    )  # fmt: skip
    hidden = keys.get("intermediate_size", 4 * keys["hidden_size"])
    ffn = MLP.Config(hidden=hidden, act=keys.activation("activation_function", "gelu_new"))
    return {
        "attn": PreNorm.Config(fn=attn, norm=norm, dropout=dropout),
        "ffn": PreNorm.Config(fn=ffn, norm=norm, dropout=dropout),
    }


def kinds(keys: Keys) -> list[str]:
    """GLOBAL or LOCAL for every layer: `attention_types` [[[kinds], times], ...], and the same again layer by layer."""
    depth = keys["num_layers"]
    runs: list[tuple[list[str], int]] = keys.get("attention_types", [[[GLOBAL, LOCAL], 12]])
    types = [kind for period, times in runs for kind in period * times]
    keys.fixed("attention_layers", types, None)
    if len(types) != depth:
        raise ValueError(f"config.json: attention_types names {len(types)} layers, but num_layers is {depth}")
    for kind in types:
        if kind not in (GLOBAL, LOCAL):
            near = nearest(kind, (GLOBAL, LOCAL))
            raise ValueError(f"config.json: the attention type {kind!r} is not supported for {keys.name}{near}")
    return types


def neo_rules(keys: Keys) -> list[Rule]:
    layer, ours = "transformer.h.{i}.", "layers.{i}."
    return [
        *outer_rules(keys, "wte", "wpe"),
        Drop(layer + "attn.attention.bias"),
        Drop(layer + "attn.attention.masked_bias"),
        *(Rename(f"{layer}attn.attention.{name}_proj.", f"{ours}attn.fn.{name}.") for name in ("q", "k", "v", "out")),
        Rename(layer + "mlp.c_fc.", ours + "ffn.fn.up."),
        Rename(layer + "mlp.c_proj.", ours + "ffn.fn.down."),
        Rename(layer + "ln_1.", ours + "attn.norm."),
        Rename(layer + "ln_2.", ours + "ffn.norm."),
        Rename("transformer.ln_f.", "norm."),
    ]


# Table 2.1, where it agrees with the parameter counts of table D.1. It prints 24 heads for XL, which do not divide 2048
# and with heads of 128 would make 1.5 B; and a width of 5140 for 13B, where 40 heads of 128 and 12,850 M need 5120.
# How wide the band is, the paper does not say; 256 is GPT-Neo's.
COMMON = {"model_type": "gpt3", "vocab_size": 50257, "n_positions": 2048, "activation_function": "gelu_new"}
COMMON |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "attention_window": 256}
SIZES = {
    "gpt3-small": COMMON | gpt1.size(768, 12, 12),
    "gpt3-medium": COMMON | gpt1.size(1024, 24, 16),
    "gpt3-large": COMMON | gpt1.size(1536, 24, 16),
    "gpt3-xl": COMMON | gpt1.size(2048, 24, 16),
    "gpt3-2.7b": COMMON | gpt1.size(2560, 32, 32),
    "gpt3-6.7b": COMMON | gpt1.size(4096, 32, 32),
    "gpt3-13b": COMMON | gpt1.size(5120, 40, 40),
    "gpt3-175b": COMMON | gpt1.size(12288, 96, 96),
}


def neo_size(dim: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neo", "vocab_size": 50257, "max_position_embeddings": 2048, "hidden_size": dim,
        "num_layers": layers, "num_heads": heads, "attention_types": [[[GLOBAL, LOCAL], layers // 2]],
        "window_size": 256, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    }  # fmt: skip


NEO_SIZES = {
    "gpt-neo-125m": neo_size(768, 12, 12),
    "gpt-neo-1.3b": neo_size(2048, 24, 16),
    "gpt-neo-2.7b": neo_size(2560, 32, 20),
}
GPT3 = Family(
    name="gpt3", architectures=("GPT3LMHeadModel",), config=config, rules=gpt2.rules, prefix="transformer.", sizes=SIZES
)
GPT_NEO = Family(
    name="gpt_neo", architectures=("GPTNeoForCausalLM",), config=gpt_neo, rules=neo_rules, prefix="transformer.",
    sizes=NEO_SIZES,
)  # fmt: skip
register(GPT3)
register(GPT_NEO)

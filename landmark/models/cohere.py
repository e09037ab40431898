"""Cohere's Command R (2024): PaLM's layer with more heads of keys; in Command R+ a norm of its own for every head of
queries and keys. Cohere 2 (2024): three of four layers look through a window, the fourth sees all and has no positions.
"""

from __future__ import annotations

from typing import Any

from ..nn.attention import Attention, HeadNorm
from ..nn.residual import Layer
from ..weights.rules import Flatten, Rule
from . import palm
from .decoder import Decoder
from .layer_keys import FULL, SLIDING, layer_types
from .llama import attention, decoder, size
from .palm import both, layer_norm
from .registry import Family, Keys, register
from .rope_keys import rope


def cohere(keys: Keys) -> Decoder.Config:
    keys.inert("model_max_length", "pretraining_tp")
    norm = HeadNorm.Config(norm=layer_norm(keys), separate=True) if keys.get("use_qk_norm", False) else None
    turn = rope(keys, head_dim(keys), theta=500_000.0, interleaved=True)
    layer = both(keys, attend(keys, rope=turn, qk_norm=norm))
    return model(keys, [layer] * keys["num_hidden_layers"])


def cohere2(keys: Keys) -> Decoder.Config:
    window = keys.nullable("sliding_window", 4096)
    every = keys.get("sliding_window_pattern", keys.get("_sliding_window_pattern", 4))
    for key, value in {
        "layer_switch": every, "order_of_interleaved_layers": "local_attn_first", "position_embedding_type":
        "rope_gptj", "rotary_pct": 1.0, "use_embedding_sharing": True, "use_gated_activation": True,
        "use_parallel_block": True, "use_parallel_embedding": False, "use_qk_norm": False,
    }.items():  # fmt: skip
        keys.fixed(key, value, None)
    turn = rope(keys, head_dim(keys), interleaved=True)
    layers = {
        FULL: both(keys, attend(keys, rope=None)), SLIDING: both(keys, attend(keys, rope=turn, window=window)),
    }  # fmt: skip
    return model(keys, [layers[kind] for kind in layer_types(keys, window, lambda i: (i + 1) % every != 0)])


def head_dim(keys: Keys) -> int:
    width: int = keys.get("head_dim") or keys.quotient("hidden_size", "num_attention_heads")
    return width


def attend(keys: Keys, **own: Any) -> Attention.Config:
    bias = keys.get("attention_bias", False)
    return attention(keys, head_dim=head_dim(keys), bias=bias, out_bias=bias, **own)


def model(keys: Keys, layers: list[Layer]) -> Decoder.Config:
    scale = keys.get("logit_scale", 0.0625)
    return decoder(keys, layers, norm=layer_norm(keys), tied=True, logit_scale=scale)


def rules(keys: Keys) -> list[Rule]:
    theirs, ours = "model.layers.{i}.self_attn.", "layers.{i}.both.fns.attn."
    heads = keys["num_attention_heads"]
    counts = {"q_norm.": heads, "k_norm.": keys.get("num_key_value_heads", heads)}
    norms = [Flatten(f"{theirs}{name}weight", f"{ours}{name}norm.weight", rows) for name, rows in counts.items()]
    return [*norms, *palm.rules(keys)]


COMMON = {"vocab_size": 256000, "layer_norm_eps": 1e-5, "tie_word_embeddings": True}
R = COMMON | {"model_type": "cohere", "max_position_embeddings": 8192, "logit_scale": 0.0625, "rope_theta": 8e6}
PLUS = R | {"logit_scale": 0.8333333333333334, "rope_theta": 75e6, "use_qk_norm": True}
LONG = {"max_position_embeddings": 131072}
A = COMMON | {"model_type": "cohere2", "logit_scale": 0.25, "rope_theta": 5e4, "head_dim": 128}
A |= {"sliding_window": 4096, "sliding_window_pattern": 4}
COHERE = Family(
    name="cohere",
    architectures=("CohereForCausalLM",),
    config=cohere,
    rules=rules,
    prefix="model.",
    sizes={
        "command-r": size(8192, 22528, 40, 64, 64, **R),
        "command-r-08-2024": size(8192, 24576, 40, 64, 8, **R | LONG | {"rope_theta": 4e6}),
        "command-r-plus": size(12288, 33792, 64, 96, 8, **PLUS),
        "command-r-plus-08-2024": size(12288, 33792, 64, 96, 8, **PLUS | LONG | {"rope_theta": 8e6}),
    },
)
COHERE2 = Family(
    name="cohere2",
    architectures=("Cohere2ForCausalLM",),
    config=cohere2,
    rules=rules,
    prefix="model.",
    sizes={
        "command-r7b": size(4096, 14336, 32, 32, 8, **A, max_position_embeddings=132096),
        "command-a": size(12288, 36864, 64, 96, 8, **A, max_position_embeddings=131072),
    },
)
register(COHERE)
register(COHERE2)

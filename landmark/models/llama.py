"""LLaMA (Touvron et al. 2023), Llama 2, Llama 3 - 3.3: pre-norm RMSNorm, rotary GQA, SwiGLU, no biases.

The families that grew from it (Mistral, Qwen, Gemma ...) are said with the same few functions: `attention`, `glu`,
`pre_norm`, `decoder` and `rules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import ModuleConfig
from ..nn.attention import Attention
from ..nn.embedding import Embedding, Head
from ..nn.feedforward import GLU
from ..nn.norm import NormConfig, RMSNorm
from ..nn.residual import Layer, PreNorm
from ..weights.rules import Drop, Rename, Rule
from .base import Init
from .decoder import Decoder
from .registry import Family, Keys, register
from .rope_keys import rope

NORMS = {"input_layernorm": "attn.norm", "post_attention_layernorm": "ffn.norm"}


def rules(
    keys: Keys, *, norms: Mapping[str, str] = NORMS, tied: bool = False, attn: str = "attn.fn", ffn: str = "ffn.fn"
) -> list[Rule]:
    """The layout of Llama's tensors; `tied` is the family's default, `norms` its names for a layer's norms, `attn` and
    `ffn` where our layer has its functions."""
    layer, ours = "model.layers.{i}.", "layers.{i}."
    tied = keys.get("tie_word_embeddings", tied)
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out", "q_norm": "q_norm.norm"}
    names |= {"k_norm": "k_norm.norm"}
    return [
        *([Drop("lm_head.weight", same_as="model.embed_tokens.weight")] if tied else []),
        Rename("model.embed_tokens.", "embed.tokens."),
        Rename("lm_head.weight", "head.linear.weight"),
        Drop(layer + "self_attn.rotary_emb.inv_freq"),
        *(Rename(f"{layer}self_attn.{name}.", f"{ours}{attn}.{own}.") for name, own in names.items()),
        *(Rename(f"{layer}mlp.{name}_proj.", f"{ours}{ffn}.{name}.") for name in ("gate", "up", "down")),
        *(Rename(f"{layer}{name}.", f"{ours}{own}.") for name, own in norms.items()),
        Rename("model.norm.", "norm."),
    ]


def attention(keys: Keys, *, head_dim: int | None = None, **own: Any) -> Attention.Config:
    """Rotary attention as the usual keys say; `head_dim` is the family's default, `own` what it has of its own."""
    heads = keys["num_attention_heads"]
    head_dim = keys.get("head_dim", head_dim) or keys.quotient("hidden_size", "num_attention_heads")
    kv_heads, dropout = keys.get("num_key_value_heads", heads), keys.get("attention_dropout", 0.0)
    own = own if "rope" in own else {**own, "rope": rope(keys, head_dim)}
    return Attention.Config(heads=heads, kv_heads=kv_heads, head_dim=head_dim, dropout=dropout, **own)


def rms_norm(keys: Keys, *, offset: float = 0.0) -> RMSNorm.Config:
    return RMSNorm.Config(eps=keys.get("rms_norm_eps", 1e-6), offset=offset)


def pre_norm(attn: ModuleConfig, ffn: ModuleConfig, norm: NormConfig) -> Mapping[str, ModuleConfig]:
    """A layer of attention and feed-forward, each behind a norm."""
    return {"attn": PreNorm.Config(fn=attn, norm=norm), "ffn": PreNorm.Config(fn=ffn, norm=norm)}


def glu(keys: Keys, *, bias: bool = False) -> GLU.Config:
    return GLU.Config(hidden=keys["intermediate_size"], act=keys.activation(), bias=bias)


def decoder(
    keys: Keys, layers: Sequence[Layer], *, norm: NormConfig | None = None, tied: bool = False, scale: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, init: Init = Init(),
) -> Decoder.Config:  # fmt: skip
    """The whole model; `scale` is the embedding's, `softcap` bounds the logits, `tied` is the family's default."""
    vocab = keys["vocab_size"]
    return Decoder.Config(
        dim=keys["hidden_size"],
        embed=Embedding.Config(vocab=vocab, scale=scale),
        layers=tuple(layers),
        norm=norm or rms_norm(keys),
        context=keys.get("max_position_embeddings"),
        head=Head.Config(vocab=vocab, tied=keys.get("tie_word_embeddings", tied), scale=logit_scale, softcap=softcap),
        init=init,
    )


def config(keys: Keys) -> Decoder.Config:
    bias = keys.get("attention_bias", False)
    attn, ffn = attention(keys, bias=bias, out_bias=bias), glu(keys, bias=keys.get("mlp_bias", False))
    keys.inert("pretraining_tp", "max_sequence_length")
    return decoder(keys, [pre_norm(attn, ffn, rms_norm(keys))] * keys["num_hidden_layers"])


def size(dim: int, hidden: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    """The part of a config.json that all sizes of these families share."""
    return {
        "hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, **more,
    }  # fmt: skip


def generation(
    theta: float, context: int, vocab: int, eps: float = 1e-5, factor: float | None = None
) -> dict[str, Any]:
    """What the sizes of one generation share; `factor` is the stretch of Llama 3.1's rotary positions."""
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {
        "model_type": "llama", "vocab_size": vocab, "max_position_embeddings": context, "rms_norm_eps": eps,
        "rope_theta": theta, "rope_scaling": {"rope_type": "llama3", "factor": factor, **bands} if factor else None,
    }  # fmt: skip


LLAMA1, LLAMA2 = generation(1e4, 2048, 32000, 1e-6), generation(1e4, 4096, 32000)
LLAMA3, LLAMA31 = generation(5e5, 8192, 128256), generation(5e5, 131072, 128256, factor=8.0)
LLAMA32 = generation(5e5, 131072, 128256, factor=32.0) | {"tie_word_embeddings": True}
DEEPSEEK = generation(1e4, 4096, 102400, 1e-6)
SIZES = {
    "llama-7b": size(4096, 11008, 32, 32, 32, **LLAMA1),
    "llama-13b": size(5120, 13824, 40, 40, 40, **LLAMA1),
    "llama-33b": size(6656, 17920, 60, 52, 52, **LLAMA1),
    "llama-65b": size(8192, 22016, 80, 64, 64, **LLAMA1 | {"rms_norm_eps": 1e-5}),
    "llama2-7b": size(4096, 11008, 32, 32, 32, **LLAMA2),
    "llama2-13b": size(5120, 13824, 40, 40, 40, **LLAMA2),
    "llama2-70b": size(8192, 28672, 80, 64, 8, **LLAMA2),
    "llama3-8b": size(4096, 14336, 32, 32, 8, **LLAMA3),
    "llama3-70b": size(8192, 28672, 80, 64, 8, **LLAMA3),
    "llama3.1-8b": size(4096, 14336, 32, 32, 8, **LLAMA31),
    "llama3.1-70b": size(8192, 28672, 80, 64, 8, **LLAMA31),
    "llama3.1-405b": size(16384, 53248, 126, 128, 8, **LLAMA31),
    "llama3.2-1b": size(2048, 8192, 16, 32, 8, **LLAMA32),
    "llama3.2-3b": size(3072, 8192, 28, 24, 8, **LLAMA32),
    "deepseek-67b": size(8192, 22016, 95, 64, 8, **DEEPSEEK),
    "llama3.3-70b": size(8192, 28672, 80, 64, 8, **LLAMA31),
}
LLAMA = Family(
    name="llama", architectures=("LlamaForCausalLM",), config=config, rules=rules, prefix="model.", sizes=SIZES
)
register(LLAMA)

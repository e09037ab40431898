"""GPT-NeoX-20B (Black et al. 2022) and Pythia (Biderman et al. 2023): GPT-3 with rotary positions on a quarter of each
head, and attention and feed-forward side by side, each behind a norm of its own."""

from __future__ import annotations

from typing import Any

from ..config import ModuleConfig
from ..nn.attention import Attention
from ..nn.embedding import Embedding, Head
from ..nn.feedforward import MLP
from ..nn.norm import LayerNorm
from ..nn.residual import Layer, Normed, Parallel, PreNorm
from ..weights.rules import Drop, Rename, Rule, Split
from .base import Init
from .decoder import Decoder
from .registry import Family, Keys, register
from .rope_keys import rope


def config(keys: Keys) -> Decoder.Config:
    dim, heads, vocab = keys["hidden_size"], keys["num_attention_heads"], keys["vocab_size"]
    head_dim, bias = keys.quotient("hidden_size", "num_attention_heads"), keys.get("attention_bias", True)
    theta, fraction = keys.get("rotary_emb_base", 10_000.0), keys.get("rotary_pct", 0.25)
    dropout = keys.get("hidden_dropout", keys.get("hidden_dropout_prob", 0.0))
    keys.inert("is_decoder")
    attn = Attention.Config(
        heads=heads, kv_heads=heads, head_dim=head_dim, bias=bias, out_bias=bias,
        rope=rope(keys, head_dim, theta=theta, fraction=fraction),
        dropout=keys.get("attention_dropout", keys.get("attention_probs_dropout_prob", 0.0)),
    )  # fmt: skip
    ffn, norm = MLP.Config(hidden=keys["intermediate_size"], act=keys.activation(default="gelu")), layer_norm(keys)
    return Decoder.Config(
        dim=dim,
        embed=Embedding.Config(vocab=vocab, dropout=dropout),
        layers=(layer(keys, {"attn": attn, "ffn": ffn}, norm, dropout),) * keys["num_hidden_layers"],
        norm=norm,
        context=keys.get("max_position_embeddings"),
        head=Head.Config(vocab=vocab, tied=keys.get("tie_word_embeddings", False)),
        init=Init(std=keys.get("initializer_range", 0.02)),
    )


def layer_norm(keys: Keys) -> LayerNorm.Config:
    return LayerNorm.Config(eps=keys.get("layer_norm_eps", 1e-5))


def parallel(keys: Keys) -> bool:
    """Whether the two functions of a layer read the same input; otherwise they follow each other, as in GPT-2."""
    return bool(keys.get("use_parallel_residual", True))


def layer(keys: Keys, fns: dict[str, ModuleConfig], norm: LayerNorm.Config, dropout: float) -> Layer:
    if not parallel(keys):
        return {name: PreNorm.Config(fn=fn, norm=norm, dropout=dropout) for name, fn in fns.items()}
    branches = {name: Normed.Config(fn=fn, norm=norm) for name, fn in fns.items()}
    return {"both": Parallel.Config(fns=branches, norm=None, dropout=dropout)}


def rules(keys: Keys) -> list[Rule]:
    dim, heads, table = keys["hidden_size"], keys["num_attention_heads"], "gpt_neox.embed_in.weight"
    theirs = "gpt_neox.layers.{i}."
    ours = "layers.{i}.both.fns." if parallel(keys) else "layers.{i}."
    buffers = ("bias", "masked_bias", "rotary_emb.inv_freq")
    return [
        *([Drop("embed_out.weight", same_as=table)] if keys.get("tie_word_embeddings", False) else []),
        Rename("embed_out.weight", "head.linear.weight"),
        Rename(table, "embed.tokens.weight"),
        *(Drop(f"{theirs}attention.{name}") for name in buffers),
        Split(theirs + "attention.query_key_value.", [f"{ours}attn.fn.{n}." for n in "qkv"], [dim] * 3, heads=heads),
        Rename(theirs + "attention.dense.", ours + "attn.fn.out."),
        Rename(theirs + "mlp.dense_h_to_4h.", ours + "ffn.fn.up."),
        Rename(theirs + "mlp.dense_4h_to_h.", ours + "ffn.fn.down."),
        Rename(theirs + "input_layernorm.", ours + "attn.norm."),
        Rename(theirs + "post_attention_layernorm.", ours + "ffn.norm."),
        Rename("gpt_neox.final_layer_norm.", "norm."),
    ]


def size(dim: int, layers: int, heads: int, vocab: int, act: str = "gelu") -> dict[str, Any]:
    return {
        "model_type": "gpt_neox", "vocab_size": vocab, "hidden_size": dim, "intermediate_size": 4 * dim,
        "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": act, "rotary_pct": 0.25,
        "rotary_emb_base": 10000, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
        "use_parallel_residual": True, "tie_word_embeddings": False,
    }  # fmt: skip


SIZES = {
    "pythia-70m": size(512, 6, 8, 50304),
    "pythia-160m": size(768, 12, 12, 50304),
    "pythia-410m": size(1024, 24, 16, 50304),
    "pythia-1b": size(2048, 16, 8, 50304),
    "pythia-1.4b": size(2048, 24, 16, 50304),
    "pythia-2.8b": size(2560, 32, 32, 50304),
    "pythia-6.9b": size(4096, 32, 32, 50432),
    "pythia-12b": size(5120, 36, 40, 50688),
    "gpt-neox-20b": size(6144, 44, 64, 50432, act="gelu_fast"),
}
NEOX = Family(
    name="gpt_neox", architectures=("GPTNeoXForCausalLM",), config=config, rules=rules, prefix="gpt_neox.", sizes=SIZES
)
register(NEOX)

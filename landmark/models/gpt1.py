"""GPT-1 (Radford et al. 2018): the 2017 decoder by itself - post-norm layers, learned positions, GELU, tied embedding.

What GPT-2 and GPT-3 kept is said here: `attention`, `mlp`, `decoder` and the layout of the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import ModuleConfig
from ..nn.attention import Attention
from ..nn.embedding import Embedding, Head
from ..nn.feedforward import MLP
from ..nn.norm import LayerNorm, NormConfig
from ..nn.position import LearnedPositions
from ..nn.residual import Layer, PostNorm
from ..ops.activation import Activation
from ..weights.rules import Drop, Rename, Rule, Split, Transpose
from .base import Init
from .decoder import Decoder
from .registry import Family, Keys, register

INERT = ("n_special", "predict_special_tokens", "_num_labels", "is_decoder")


def attention(keys: Keys, **own: Any) -> Attention.Config:
    """As many heads for keys as for queries, with biases; `own` is what a family has of its own."""
    heads, dropout = keys["n_head"], keys.get("attn_pdrop", 0.1)
    return Attention.Config(
        heads=heads, kv_heads=heads, head_dim=keys.quotient("n_embd", "n_head"), bias=True, out_bias=True,
        dropout=dropout, **own,
    )  # fmt: skip


def layer_norm(keys: Keys) -> LayerNorm.Config:
    return LayerNorm.Config(eps=keys.get("layer_norm_epsilon", 1e-5))


def decoder(
    keys: Keys, layers: Sequence[Layer], *, dim: int, context: int, norm: NormConfig | None, dropout: float,
    residual: bool = True,
) -> Decoder.Config:  # fmt: skip
    """The whole model; `dropout` is the embedding's, `residual`: matrices that end a sublayer begin smaller."""
    vocab = keys["vocab_size"]
    keys.inert(*INERT)
    return Decoder.Config(
        dim=dim,
        embed=Embedding.Config(vocab=vocab, positions=LearnedPositions.Config(size=context), dropout=dropout),
        layers=tuple(layers),
        norm=norm,
        context=context,
        head=Head.Config(vocab=vocab, tied=keys.get("tie_word_embeddings", True)),
        init=Init(std=keys.get("initializer_range", 0.02), residual=residual),
    )


def config(keys: Keys) -> Decoder.Config:
    norm, dropout = layer_norm(keys), keys.get("resid_pdrop", 0.1)

    def wrap(fn: ModuleConfig) -> PostNorm.Config:
        return PostNorm.Config(fn=fn, norm=norm, dropout=dropout)

    layer = {"attn": wrap(attention(keys)), "ffn": wrap(MLP.Config(hidden=4 * keys["n_embd"], act=activation(keys)))}
    return decoder(
        keys, [layer] * keys["n_layer"], dim=keys["n_embd"], context=keys.get("n_positions", 512), norm=None,
        dropout=keys.get("embd_pdrop", 0.1), residual=False,
    )  # fmt: skip


def activation(keys: Keys) -> Activation:
    """In these files "gelu" means its tanh approximation."""
    act = keys.activation("afn", "gelu")
    return "gelu_tanh" if act == "gelu" else act


def rules(keys: Keys) -> list[Rule]:
    return [*outer_rules(keys, "tokens_embed", "positions_embed"), *layer_rules(keys["n_embd"])]


def outer_rules(keys: Keys, tokens: str, positions: str) -> list[Rule]:
    """Embeddings and head, by the names that a family has for its two tables."""
    tied, table = keys.get("tie_word_embeddings", True), f"transformer.{tokens}.weight"
    return [
        *([Drop("lm_head.weight", same_as=table)] if tied else []),
        Rename("lm_head.weight", "head.linear.weight"),
        Rename(table, "embed.tokens.weight"),
        Rename(f"transformer.{positions}.weight", "embed.positions.table.weight"),
        Drop("transformer.position_ids"),
    ]


def layer_rules(dim: int) -> list[Rule]:
    """A layer's tensors: matrices are stored [in, out], queries, keys and values as one; masks are no weights."""
    layer, ours = "transformer.h.{i}.", "layers.{i}."
    return [
        Drop(layer + "attn.bias"),
        Drop(layer + "attn.masked_bias"),
        Split(layer + "attn.c_attn.", [f"{ours}attn.fn.{name}." for name in "qkv"], [dim] * 3, transposed=True),
        Transpose(layer + "attn.c_proj.", ours + "attn.fn.out."),
        Transpose(layer + "mlp.c_fc.", ours + "ffn.fn.up."),
        Transpose(layer + "mlp.c_proj.", ours + "ffn.fn.down."),
        Rename(layer + "ln_1.", ours + "attn.norm."),
        Rename(layer + "ln_2.", ours + "ffn.norm."),
    ]


def size(dim: int, layers: int, heads: int) -> dict[str, Any]:
    return {"n_embd": dim, "n_layer": layers, "n_head": heads, "layer_norm_epsilon": 1e-5}


SIZES = {
    "gpt1": size(768, 12, 12) | {
        "model_type": "openai-gpt", "vocab_size": 40478, "n_positions": 512, "afn": "gelu", "embd_pdrop": 0.1,
        "attn_pdrop": 0.1, "resid_pdrop": 0.1,
    },
}  # fmt: skip
GPT1 = Family(
    name="openai-gpt",
    architectures=("OpenAIGPTLMHeadModel",),
    config=config,
    rules=rules,
    prefix="transformer.",
    sizes=SIZES,
)
register(GPT1)

"""The Transformer (Vaswani et al. 2017): encoder-decoder, post-norm, sinusoidal positions, one embedding for all.

Read and written in the layout of Marian, whose models are of this kind: sines in the first half of a position's vector
and cosines in the second, as in the paper's own public code (the paper interleaves them), and biases everywhere.
"""

from __future__ import annotations

import math

from ..config import ModuleConfig
from ..nn.attention import Attention, CrossAttention
from ..nn.embedding import Embedding, Head
from ..nn.feedforward import MLP
from ..nn.norm import LayerNorm
from ..nn.position import SinusoidalPositions
from ..nn.residual import Layer, PostNorm
from ..weights.rules import Drop, Flatten, Rename, Rule
from .backbone import Backbone
from .base import Init
from .decoder import Decoder
from .encoder_decoder import EncoderDecoder
from .registry import Family, Keys, register


def config(keys: Keys) -> EncoderDecoder.Config:
    dim, context, dropout = keys["d_model"], keys.get("max_position_embeddings", 1024), keys.get("dropout", 0.1)
    act, attention_dropout = keys.activation("activation_function", "gelu"), keys.get("attention_dropout", 0.0)
    shared, tied = keys.get("share_encoder_decoder_embeddings", True), keys.get("tie_word_embeddings", True)
    vocab = keys["vocab_size"]
    target_vocab = keys.get("decoder_vocab_size", vocab)
    for key in ("normalize_before", "normalize_embedding", "add_final_layer_norm", "add_bias_logits", "is_decoder"):
        keys.fixed(key, False, None)
    for key in ("activation_dropout", "encoder_layerdrop", "decoder_layerdrop"):
        keys.fixed(key, 0, 0.0, None)
    keys.fixed("static_position_embeddings", True, None)
    keys.inert("init_std", "classif_dropout", "extra_pos_embeddings", "num_hidden_layers", "bad_words_ids")
    # Glorot's spread for a square matrix, and embeddings that have unit length before they are scaled.
    init = Init(std=dim**-0.5, residual=False)

    def embed(size: int) -> Embedding.Config:
        scale = math.sqrt(dim) if keys.get("scale_embedding", False) else 1.0
        return Embedding.Config(
            vocab=size, positions=SinusoidalPositions.Config(halves=True), scale=scale, dropout=dropout
        )

    def layer(side: str, causal: bool) -> Layer:
        heads, hidden = keys[f"{side}_attention_heads"], keys[f"{side}_ffn_dim"]
        head_dim = keys.quotient("d_model", f"{side}_attention_heads")
        kind = {"heads": heads, "head_dim": head_dim, "bias": True, "out_bias": True, "dropout": attention_dropout}
        fns: dict[str, ModuleConfig] = {"attn": Attention.Config(**kind, kv_heads=heads, causal=causal)}
        if causal:
            fns["cross"] = CrossAttention.Config(**kind)
        fns["ffn"] = MLP.Config(hidden=hidden, act=act)
        return {name: PostNorm.Config(fn=fn, norm=LayerNorm.Config(), dropout=dropout) for name, fn in fns.items()}

    return EncoderDecoder.Config(
        encoder=Backbone.Config(
            dim=dim,
            embed=embed(vocab),
            layers=(layer("encoder", causal=False),) * keys["encoder_layers"],
            norm=None,
            context=context,
            init=init,
        ),
        decoder=Decoder.Config(
            dim=dim,
            embed=embed(target_vocab),
            layers=(layer("decoder", causal=True),) * keys["decoder_layers"],
            norm=None,
            context=context,
            head=Head.Config(vocab=target_vocab, tied=tied, bias=True),
            init=init,
        ),
        shared=shared,
        start=keys.get("decoder_start_token_id", keys.get("pad_token_id", 0)),
        init=init,
    )


def rules(keys: Keys) -> list[Rule]:
    shared, tied = keys.get("share_encoder_decoder_embeddings", True), keys.get("tie_word_embeddings", True)
    out: list[Rule] = [Drop(f"model.{side}.embed_positions.weight") for side in ("encoder", "decoder")]
    if shared:
        table = "model.shared.weight"
        out += [Drop(f"model.{side}.embed_tokens.weight", same_as=table) for side in ("encoder", "decoder")]
        out += [Rename(table, "decoder.embed.tokens.weight")]
    else:
        table = "model.decoder.embed_tokens.weight"
        sides = ("encoder", "decoder")
        out += [Rename(f"model.{side}.embed_tokens.weight", f"{side}.embed.tokens.weight") for side in sides]
    out += [Drop("lm_head.weight", same_as=table) if tied else Rename("lm_head.weight", "decoder.head.linear.weight")]
    out += [Flatten("final_logits_bias", "decoder.head.bias", rows=1)]
    for side in ("encoder", "decoder"):
        theirs, ours = f"model.{side}.layers.{{i}}.", f"{side}.layers.{{i}}."
        for their, our in (("self_attn", "attn"), ("encoder_attn", "cross")):
            out += [Rename(f"{theirs}{their}.{n}_proj.", f"{ours}{our}.fn.{n}.") for n in ("q", "k", "v", "out")]
            out += [Rename(f"{theirs}{their}_layer_norm.", f"{ours}{our}.norm.")]
        out += [Rename(f"{theirs}fc1.", f"{ours}ffn.fn.up."), Rename(f"{theirs}fc2.", f"{ours}ffn.fn.down.")]
        out += [Rename(f"{theirs}final_layer_norm.", f"{ours}ffn.norm.")]
    return out


def size(dim: int, heads: int, hidden: int, dropout: float) -> dict[str, object]:
    """Table 3 of the paper: a shared vocabulary of 37000 (sec. 5.1), six layers a side."""
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in (
        ("attention_heads", heads), ("ffn_dim", hidden), ("layers", 6))}  # fmt: skip
    return {
        "model_type": "marian",
        "is_encoder_decoder": True,
        "d_model": dim,
        **sides,
        "activation_function": "relu",
        "dropout": dropout,
        "vocab_size": 37000,
        "max_position_embeddings": 1024,
        "scale_embedding": True,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "pad_token_id": 36999,
        "decoder_start_token_id": 36999,
    }


SIZES = {"transformer-base": size(512, 8, 2048, 0.1), "transformer-big": size(1024, 16, 4096, 0.3)}

register(Family(name="marian", architectures=("MarianMTModel",), config=config, rules=rules, sizes=SIZES))

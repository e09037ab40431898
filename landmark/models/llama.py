"""LLaMA (Touvron et al. 2023), Llama 2, Llama 3 - 3.3: pre-norm RMSNorm, rotary GQA, SwiGLU, no biases."""

from __future__ import annotations

from ..nn.attention import Attention
from ..nn.embedding import Embedding, Head
from ..nn.feedforward import GLU
from ..nn.norm import RMSNorm
from ..nn.residual import PreNorm
from ..weights.rules import Drop, Rename, Rule
from .decoder import Decoder
from .registry import Family, Keys, register
from .rope_keys import rope


def rules(keys: Keys) -> list[Rule]:
    layer, ours = "model.layers.{i}.", "layers.{i}."
    tied = keys.get("tie_word_embeddings", False)
    attn = [Rename(layer + f"self_attn.{n}_proj.", ours + f"attn.fn.{n}.") for n in "qkv"]
    ffn = [Rename(layer + f"mlp.{n}_proj.", ours + f"ffn.fn.{n}.") for n in ("gate", "up", "down")]
    return [
        *([Drop("lm_head.weight", same_as="model.embed_tokens.weight")] if tied else []),
        Rename("model.embed_tokens.", "embed.tokens."),
        Rename("lm_head.weight", "head.linear.weight"),
        Drop(layer + "self_attn.rotary_emb.inv_freq"),
        *attn,
        Rename(layer + "self_attn.o_proj.", ours + "attn.fn.out."),
        *ffn,
        Rename(layer + "input_layernorm.", ours + "attn.norm."),
        Rename(layer + "post_attention_layernorm.", ours + "ffn.norm."),
        Rename("model.norm.", "norm."),
    ]


def config(keys: Keys) -> Decoder.Config:
    dim, heads, vocab = keys["hidden_size"], keys["num_attention_heads"], keys["vocab_size"]
    head_dim = keys.get("head_dim", dim // heads)
    bias, norm = keys.get("attention_bias", False), RMSNorm.Config(eps=keys.get("rms_norm_eps", 1e-6))
    attn = Attention.Config(
        heads=heads,
        kv_heads=keys.get("num_key_value_heads", heads),
        head_dim=head_dim,
        bias=bias,
        out_bias=bias,
        rope=rope(keys, head_dim),
        dropout=keys.get("attention_dropout", 0.0),
    )
    act, mlp_bias = keys.get("hidden_act", "silu"), keys.get("mlp_bias", False)
    ffn = GLU.Config(hidden=keys["intermediate_size"], act=act, bias=mlp_bias)
    layer = {"attn": PreNorm.Config(fn=attn, norm=norm), "ffn": PreNorm.Config(fn=ffn, norm=norm)}
    keys.inert("pretraining_tp", "max_sequence_length")
    return Decoder.Config(
        dim=dim,
        embed=Embedding.Config(vocab=vocab),
        layers=(layer,) * keys["num_hidden_layers"],
        norm=norm,
        context=keys.get("max_position_embeddings"),
        head=Head.Config(vocab=vocab, tied=keys.get("tie_word_embeddings", False)),
    )


register(Family(name="llama", architectures=("LlamaForCausalLM",), config=config, rules=rules, prefix="model."))

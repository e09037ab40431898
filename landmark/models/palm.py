"""PaLM (Chowdhery et al. 2022): attention and feed-forward side by side behind one norm, one head of keys and values,
SwiGLU, no biases, tied embeddings (sec. 2).

PaLM was never published, so its config.json is ours, with Llama's keys, and its tensors are laid out as Cohere's, whose
models are of this kind. Heads are 256 wide and a feed-forward layer 4 times the model. Rotary positions turn pairs of
neighbours, as the RoPE paper has it; PaLM's own does not say. Embeddings begin ~ N(0, 1) and matrices with a variance
of 1 / inputs, and logits are scaled by 1 / sqrt(width), as the head is the embedding (sec. 5).
"""

from __future__ import annotations

from typing import Any

from ..config import ModuleConfig
from ..nn.attention import Attention
from ..nn.norm import LayerNorm
from ..nn.residual import Layer, Parallel
from ..weights.rules import Rule
from . import llama
from .base import Init
from .decoder import Decoder
from .llama import decoder, glu
from .registry import Family, Keys, register
from .rope_keys import rope


def layer_norm(keys: Keys) -> LayerNorm.Config:
    return LayerNorm.Config(eps=keys.get("layer_norm_eps", 1e-5), bias=False)


def both(keys: Keys, attn: ModuleConfig) -> Layer:
    """A layer of attention and SwiGLU that read the same normed input."""
    return {"both": Parallel.Config(fns={"attn": attn, "ffn": glu(keys)}, norm=layer_norm(keys))}


def config(keys: Keys) -> Decoder.Config:
    keys.fixed("num_key_value_heads", 1)
    head_dim, scale = keys.get("head_dim", 256), keys["hidden_size"] ** -0.5
    turn = rope(keys, head_dim, interleaved=True)
    attn = Attention.Config(heads=keys["num_attention_heads"], kv_heads=1, head_dim=head_dim, rope=turn)
    layers, init = [both(keys, attn)] * keys["num_hidden_layers"], Init(std=None, embedding=1.0, residual=False)
    return decoder(keys, layers, norm=layer_norm(keys), tied=True, logit_scale=scale, init=init)


def rules(keys: Keys) -> list[Rule]:
    norms = {"input_layernorm": "both.norm"}
    return llama.rules(keys, norms=norms, tied=True, attn="both.fns.attn", ffn="both.fns.ffn")


def size(dim: int, layers: int, heads: int) -> dict[str, Any]:
    """Table 1; the vocabulary is of 256 thousand pieces, texts of 2048 tokens (sec. 2 and 5)."""
    return llama.size(dim, 4 * dim, layers, heads, 1, head_dim=256) | {
        "model_type": "palm", "vocab_size": 256000, "max_position_embeddings": 2048, "rope_theta": 1e4,
    }  # fmt: skip


SIZES = {"palm-8b": size(4096, 32, 16), "palm-62b": size(8192, 64, 32), "palm-540b": size(18432, 118, 48)}
PALM = Family(name="palm", architectures=("PaLMForCausalLM",), config=config, rules=rules, prefix="model.", sizes=SIZES)
register(PALM)

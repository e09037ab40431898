"""OLMo 2 (2025): Llama with the norm after each sublayer, on what it adds, and a norm on all queries and all keys."""

from __future__ import annotations

from ..config import ModuleConfig
from ..nn.attention import ProjectionNorm
from ..nn.norm import RMSNorm
from ..nn.residual import Sandwich
from ..weights.rules import Rule
from . import llama
from .base import Init
from .decoder import Decoder
from .llama import attention, decoder, glu, size
from .registry import Family, Keys, register

NORMS = {"post_attention_layernorm": "attn.post", "post_feedforward_layernorm": "ffn.post"}


def config(keys: Keys) -> Decoder.Config:
    bias, norm = keys.get("attention_bias", False), RMSNorm.Config(eps=keys.get("rms_norm_eps", 1e-5))

    def wrap(fn: ModuleConfig) -> Sandwich.Config:
        return Sandwich.Config(fn=fn, norm=None, post=norm)

    attn = attention(keys, bias=bias, out_bias=bias, qk_norm=ProjectionNorm.Config(norm=norm))
    layer = {"attn": wrap(attn), "ffn": wrap(glu(keys))}
    return decoder(keys, [layer] * keys["num_hidden_layers"], norm=norm, init=Init(residual=False))


def rules(keys: Keys) -> list[Rule]:
    return llama.rules(keys, norms=NORMS)


COMMON = {"model_type": "olmo2", "vocab_size": 100352, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
COMMON |= {"rope_theta": 5e5}
SIZES = {
    "olmo2-1b": size(2048, 8192, 16, 16, 16, **COMMON),
    "olmo2-7b": size(4096, 11008, 32, 32, 32, **COMMON),
    "olmo2-13b": size(5120, 13824, 40, 40, 40, **COMMON),
    "olmo2-32b": size(5120, 27648, 64, 40, 8, **COMMON),
}
OLMO2 = Family(
    name="olmo2", architectures=("Olmo2ForCausalLM",), config=config, rules=rules, prefix="model.", sizes=SIZES
)
register(OLMO2)

"""Phi-3 (Abdin et al. 2024), Phi-3.5, Phi-4 and Phi-4-mini: Llama's layer with its matrices stored fused, a window in
some sizes, LongRoPE in those of 128K tokens, rotary positions on part of a head in Phi-4-mini."""

from __future__ import annotations

from typing import Any

from ..nn.norm import RMSNorm
from ..nn.residual import PreNorm
from ..weights.rules import Rule, Split
from . import llama
from .decoder import Decoder
from .llama import attention, decoder, glu, size
from .registry import Family, Keys, register


def config(keys: Keys) -> Decoder.Config:
    norm, dropout = RMSNorm.Config(eps=keys.get("rms_norm_eps", 1e-5)), keys.get("resid_pdrop", 0.0)
    keys.fixed("embd_pdrop", 0, 0.0, None)
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        keys.fixed(key, False, None)
    for key in ("full_attn_mod", "interpolate_factor"):
        keys.fixed(key, 1, None)
    fns = {"attn": attention(keys, window=keys.get("sliding_window")), "ffn": glu(keys)}
    layer = {name: PreNorm.Config(fn=fn, norm=norm, dropout=dropout) for name, fn in fns.items()}
    return decoder(keys, [layer] * keys["num_hidden_layers"], norm=norm)


def rules(keys: Keys) -> list[Rule]:
    theirs, ours = "model.layers.{i}.", "layers.{i}."
    heads, hidden = keys["num_attention_heads"], keys["intermediate_size"]
    head_dim, kv_heads = (
        keys.get("head_dim") or keys.quotient("hidden_size", "num_attention_heads"),
        keys.get("num_key_value_heads", heads),
    )
    qkv = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    return [
        Split(theirs + "self_attn.qkv_proj.", [f"{ours}attn.fn.{name}." for name in "qkv"], qkv),
        Split(theirs + "mlp.gate_up_proj.", [f"{ours}ffn.fn.{name}." for name in ("gate", "up")], [hidden] * 2),
        *llama.rules(keys),
    ]


def longrope(short: str, long: str) -> dict[str, Any]:
    """A text of up to 4096 tokens is turned by the first divisors, a longer one by the second (float32)."""
    factors = {
        name: [float(x) for x in text.split()] for name, text in (("short_factor", short), ("long_factor", long))
    }
    return {
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", **factors},
    }  # fmt: skip


MINI_128K = longrope(  # the first release, of April 2024
    short=f"1.05 1.05 1.05 1.1 1.1 1.15 1.2 1.25 1.3 1.35 1.5 {'2 ' * 21} 2.05 2.05 2.05 2.1 2.1 2.1 2.15 2.15 2.35 "
    "2.55 2.6 2.6 2.75 2.85 2.85 2.95",
    long="1.03 1.05 1.05 1.0799999 1.2299999 1.2299999 1.3 1.4499999 1.5999999 1.6499999 1.8999999 2.86 3.6899998 "
    "5.4199996 5.49 5.49 9.09 11.58 15.66 15.7699995 15.79 18.36 21.99 23.08 30.009998 32.350002 32.590004 35.560005 "
    "39.950005 53.840004 56.200005 57.950005 59.290005 59.770004 59.920006 61.190006 61.960007 62.500008 63.370007 "
    "63.480007 63.480007 63.660007 63.850006 64.08001 64.76001 64.80001 64.81001 64.81001",
)
MINI_35 = longrope(
    short="1 1.02 1.03 1.03 1.05 1.05 1.05 1.05 1.05 1.0699999 1.0999999 1.1099999 1.1599998 1.1599998 1.1699998 "
    "1.2899998 1.3399998 1.6799998 1.7899998 1.8199998 1.8499998 1.8799998 1.9099997 1.9399997 1.9899997 "
    f"{'2.0199997 ' * 6} {'2.0299997 ' * 9} 2.0799997 2.0899997 2.1899996 2.2199996 2.5899994 2.7299995 2.7499995 "
    "2.8399994",
    long="1.08 1.11 1.14 1.34 1.5899999 1.6 1.62 2.6200001 3.23 3.23 4.79 7.4 7.7000003 9.09 12.2 17.67 24.460001 "
    "28.570002 30.420002 30.840002 32.590004 32.930004 42.320004 44.960003 50.340004 50.450005 57.550003 57.930004 "
    "58.210003 60.140003 62.610004 62.620003 62.710003 63.140003 63.140003 63.770004 63.930004 63.960003 63.97 64.03 "
    "64.07 64.08 64.12 64.41 64.48 64.51 64.53 64.84",
)
MINI_4 = longrope(
    short="1 " * 48,
    long="1 1.118320672 1.250641126 1.398617824 1.564103225 1.74916897 1.956131817 2.187582649 2.446418898 2.735880826 "
    "3.059592084 3.421605075 3.826451687 4.279200023 4.785517845 5.351743533 5.984965424 6.693110555 7.485043894 "
    "8.370679318 9.36110372 10.4687158 11.70738129 13.09260651 14.64173252 16.37415215 18.31155283 20.47818807 "
    "22.90118105 25.61086418 28.64115884 32.03 32.1 32.13 32.23 32.6 32.61 32.64 32.66 32.7 32.71 32.93 32.97 33.28 "
    "33.49 33.5 44.16 47.77",
)
COMMON = {"model_type": "phi3", "vocab_size": 32064, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
SHORT = {"max_position_embeddings": 4096, "sliding_window": 2047}
WIDE = {"sliding_window": 262144}
PHI4 = {"vocab_size": 100352, "rope_theta": 250000, "max_position_embeddings": 16384, "sliding_window": None}
PHI4_MINI = {"vocab_size": 200064, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}
SIZES = {
    "phi3-mini-4k": size(3072, 8192, 32, 32, 32, **COMMON | SHORT),
    "phi3-mini-128k": size(3072, 8192, 32, 32, 32, **COMMON | WIDE | MINI_128K),
    "phi3-medium-4k": size(5120, 17920, 40, 40, 10, **COMMON | SHORT),
    "phi3.5-mini": size(3072, 8192, 32, 32, 32, **COMMON | WIDE | MINI_35),
    "phi4": size(5120, 17920, 40, 40, 10, **COMMON | PHI4),
    "phi4-mini": size(3072, 8192, 32, 24, 8, **COMMON | WIDE | MINI_4 | PHI4_MINI),
}
PHI3 = Family(name="phi3", architectures=("Phi3ForCausalLM",), config=config, rules=rules, prefix="model.", sizes=SIZES)
register(PHI3)

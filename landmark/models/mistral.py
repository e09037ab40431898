"""Mistral 7B (Jiang et al. 2023): Llama with a sliding window; later versions dropped it again."""

from __future__ import annotations

from .decoder import Decoder
from .llama import attention, decoder, glu, pre_norm, rms_norm, rules, size
from .registry import Family, Keys, register


def config(keys: Keys) -> Decoder.Config:
    attn = attention(keys, window=keys.nullable("sliding_window", 4096))
    layer = pre_norm(attn, glu(keys), rms_norm(keys))
    return decoder(keys, [layer] * keys["num_hidden_layers"])


COMMON = {"model_type": "mistral", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
V1 = COMMON | {"vocab_size": 32000, "rope_theta": 1e4, "sliding_window": 4096}
V2 = COMMON | {"vocab_size": 32000, "rope_theta": 1e6, "sliding_window": None}
V3 = V2 | {"vocab_size": 32768}
NEMO = V2 | {"vocab_size": 131072, "head_dim": 128, "max_position_embeddings": 131072}
SMALL2, LARGE2 = V3 | {"head_dim": 128}, V3 | {"head_dim": 128, "max_position_embeddings": 131072}
SMALL3 = NEMO | {"rope_theta": 1e8, "max_position_embeddings": 32768}
SIZES = {
    "mistral-7b-v0.1": size(4096, 14336, 32, 32, 8, **V1),
    "mistral-7b-v0.2": size(4096, 14336, 32, 32, 8, **V2),
    "mistral-7b-v0.3": size(4096, 14336, 32, 32, 8, **V3),
    "mistral-nemo-12b": size(5120, 14336, 40, 32, 8, **NEMO),
    "mistral-small-2409": size(6144, 16384, 56, 48, 8, **SMALL2),
    "mistral-small-2501": size(5120, 32768, 40, 32, 8, **SMALL3),
    "mistral-large-2407": size(12288, 28672, 88, 96, 8, **LARGE2),
}
MISTRAL = Family(
    name="mistral", architectures=("MistralForCausalLM",), config=config, rules=rules, prefix="model.", sizes=SIZES
)
register(MISTRAL)

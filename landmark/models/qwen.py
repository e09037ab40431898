"""Qwen2, Qwen2.5 (Yang et al. 2024): Llama with biases on q, k, v. Qwen3 (2025): a norm on queries and keys instead."""

from __future__ import annotations

from typing import Any

from ..nn.attention import HeadNorm
from .decoder import Decoder
from .layer_keys import SLIDING, layer_types
from .llama import attention, decoder, glu, pre_norm, rms_norm, rules, size
from .registry import Family, Keys, register


def qwen2(keys: Keys) -> Decoder.Config:
    return _windowed(keys, bias=True)


def qwen3(keys: Keys) -> Decoder.Config:
    bias = keys.get("attention_bias", False)
    return _windowed(keys, head_dim=128, qk_norm=HeadNorm.Config(norm=rms_norm(keys)), bias=bias, out_bias=bias)


def _windowed(keys: Keys, **own: Any) -> Decoder.Config:
    """With `use_sliding_window`, all layers from `max_window_layers` on look through a window."""
    window, first = keys.nullable("sliding_window", 4096), keys.get("max_window_layers", 28)
    if not keys.get("use_sliding_window", False):
        window = None
    full, sliding = (
        pre_norm(attention(keys, window=width, **own), glu(keys), rms_norm(keys)) for width in (None, window)
    )
    types = layer_types(keys, window, lambda i: window is not None and i >= first)
    return decoder(keys, [sliding if kind == SLIDING else full for kind in types])


def published(kind: str, vocab: int, context: int, tied: bool = False, eps: float = 1e-6) -> dict[str, Any]:
    return {
        "model_type": kind, "vocab_size": vocab, "max_position_embeddings": context, "tie_word_embeddings": tied,
        "rms_norm_eps": eps, "rope_theta": 1e6,
    }  # fmt: skip


def third(tied: bool) -> dict[str, Any]:
    return {**published("qwen3", 151936, 40960, tied), "head_dim": 128}


QWEN2_SIZES = {
    "qwen2-0.5b": size(896, 4864, 24, 14, 2, **published("qwen2", 151936, 131072, tied=True)),
    "qwen2-1.5b": size(1536, 8960, 28, 12, 2, **published("qwen2", 151936, 131072, tied=True)),
    "qwen2-7b": size(3584, 18944, 28, 28, 4, **published("qwen2", 152064, 131072)),
    "qwen2-72b": size(8192, 29568, 80, 64, 8, **published("qwen2", 152064, 131072)),
    "qwen2.5-0.5b": size(896, 4864, 24, 14, 2, **published("qwen2", 151936, 32768, tied=True)),
    "qwen2.5-1.5b": size(1536, 8960, 28, 12, 2, **published("qwen2", 151936, 131072, tied=True)),
    "qwen2.5-3b": size(2048, 11008, 36, 16, 2, **published("qwen2", 151936, 32768, tied=True)),
    "qwen2.5-7b": size(3584, 18944, 28, 28, 4, **published("qwen2", 152064, 131072)),
    "qwen2.5-14b": size(5120, 13824, 48, 40, 8, **published("qwen2", 152064, 131072, eps=1e-5)),
    "qwen2.5-32b": size(5120, 27648, 64, 40, 8, **published("qwen2", 152064, 131072, eps=1e-5)),
    "qwen2.5-72b": size(8192, 29568, 80, 64, 8, **published("qwen2", 152064, 131072, eps=1e-5)),
}
LONG = {"max_position_embeddings": 262144, "rope_theta": 5e6}
QWEN3_SIZES = {
    "qwen3-0.6b": size(1024, 3072, 28, 16, 8, **third(tied=True)),
    "qwen3-1.7b": size(2048, 6144, 28, 16, 8, **third(tied=True)),
    "qwen3-4b": size(2560, 9728, 36, 32, 8, **third(tied=True)),
    "qwen3-4b-2507": size(2560, 9728, 36, 32, 8, **third(tied=True) | LONG),
    "qwen3-8b": size(4096, 12288, 36, 32, 8, **third(tied=False)),
    "qwen3-14b": size(5120, 17408, 40, 40, 8, **third(tied=False)),
    "qwen3-32b": size(5120, 25600, 64, 64, 8, **third(tied=False)),
}
QWEN2 = Family(
    name="qwen2", architectures=("Qwen2ForCausalLM",), config=qwen2, rules=rules, prefix="model.", sizes=QWEN2_SIZES
)
QWEN3 = Family(
    name="qwen3", architectures=("Qwen3ForCausalLM",), config=qwen3, rules=rules, prefix="model.", sizes=QWEN3_SIZES
)
register(QWEN2)
register(QWEN3)

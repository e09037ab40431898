"""Mamba-2 (Dao and Gu 2024), and Codestral Mamba (Mistral AI 2024), the largest model of its kind."""

from __future__ import annotations

import math
from typing import Any

from ..nn.mamba2 import Mamba2
from ..nn.norm import RMSNorm
from ..weights.rules import Flatten, Rename, Rule
from .decoder import Decoder
from .mamba import body_rules, decoder, steps
from .registry import Family, Keys, register


def number(value: Any) -> float:
    """A number of a config.json, where newer files write infinity as an object."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def config(keys: Keys) -> Decoder.Config:
    heads, width, expand = keys.get("num_heads", 128), keys.get("head_dim", 64), keys.get("expand", 2)
    if heads * width != expand * keys["hidden_size"]:
        raise ValueError(
            f"config.json: num_heads {heads} x head_dim {width} must be expand {expand} x hidden_size "
            f"{keys['hidden_size']}"
        )
    least, most = map(number, keys.get("time_step_limit", (0.0, math.inf)))
    mixer = Mamba2.Config(
        heads=heads,
        head_dim=width,
        state=keys.get("state_size", 128),
        groups=keys.get("n_groups", 8),
        conv=keys.get("conv_kernel", 4),
        bias=keys.get("use_bias", False),
        conv_bias=keys.get("use_conv_bias", True),
        norm=RMSNorm.Config(eps=keys.get("layer_norm_epsilon", 1e-5)),
        steps=steps(keys),
        least_step=least,
        most_step=None if math.isinf(most) else most,
    )
    keys.inert("chunk_size", "time_step_rank", "norm_before_gate", "rms_norm")  # results do not depend on them
    return decoder(keys, mixer, tied=False)


def rules(keys: Keys) -> list[Rule]:
    theirs, ours = "backbone.layers.{i}.mixer.", "layers.{i}.mixer.fn."
    channels = keys.get("num_heads", 128) * keys.get("head_dim", 64)
    channels += 2 * keys.get("n_groups", 8) * keys.get("state_size", 128)
    return [
        Flatten(theirs + "conv1d.weight", ours + "conv.weight", channels),
        Rename(theirs + "conv1d.bias", ours + "conv.bias"),
        Rename(theirs + "in_proj.", ours + "inner."),
        Rename(theirs + "out_proj.", ours + "out."),
        *(Rename(theirs + name, ours + name) for name in ("A_log", "D", "dt_bias", "norm.weight")),
        *body_rules(keys, tied=False),
    ]


def size(dim: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "mamba2", "hidden_size": dim, "num_hidden_layers": layers, "num_heads": dim // 32, "head_dim": 64,
        "n_groups": 1, "state_size": 128, "vocab_size": 50288, "tie_word_embeddings": True,
    }  # fmt: skip


SIZES = {
    "mamba2-130m": size(768, 24), "mamba2-370m": size(1024, 48), "mamba2-780m": size(1536, 48),
    "mamba2-1.3b": size(2048, 48), "mamba2-2.7b": size(2560, 64),
    "codestral-mamba-7b": size(4096, 64) | {"n_groups": 8, "vocab_size": 32768, "tie_word_embeddings": False},
}  # fmt: skip
register(
    Family(
        name="mamba2", architectures=("Mamba2ForCausalLM",), config=config, rules=rules, prefix="backbone.", sizes=SIZES
    )
)

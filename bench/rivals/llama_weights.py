"""A Llama's or Mixtral's weights as Hugging Face keeps them, named and ordered as llama.cpp does; needs numpy alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp", "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps", "block_sparse_moe.experts.w2": "ffn_down_exps",
}  # fmt: skip
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(file: Path) -> dict[str, np.ndarray]:
    """A safetensors file of bfloat16, mapped, as uint16."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(size))
    raw = np.memmap(file, dtype=np.uint8, mode="r", offset=8 + size)
    header.pop("__metadata__", None)
    if others := {entry["dtype"] for entry in header.values()} - {"BF16"}:
        raise ValueError(f"{file} has {', '.join(sorted(others))}; only bfloat16 is written as GGUF here")
    return {
        name: raw[slice(*entry["data_offsets"])].view(np.uint16).reshape(entry["shape"])
        for name, entry in header.items()
    }


def stacked(weights: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Experts' matrices [out, in] as one [experts, out, in], named without their numbers; the others as they are."""
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, weight in weights.items():
        if (found := EXPERT.fullmatch(name)) is None:
            yield name, weight
        else:
            experts.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = weight
    for name, each in experts.items():
        yield name, np.stack([each[number] for number in range(len(each))])


def target(name: str) -> str:
    """llama.cpp's name of a tensor."""
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves to pairs: llama.cpp turns neighbours (RoFormer, eq. 34), Hugging Face halves."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def divisors(base: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """float32 [head_dim / 2]: what Llama 3.1's scaling divides each frequency by."""
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)

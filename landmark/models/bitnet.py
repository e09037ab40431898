"""BitNet b1.58 2B4T (Ma et al. 2025, 2504.12285): Llama with squared ReLU, and a norm before the last matrix of each
sublayer. `quantization_config` makes its linear maps ternary; without one they are plain."""

from __future__ import annotations

from typing import Any

from ..nn.feedforward import GLU
from ..weights.rules import Rename, Rule
from . import llama
from .decoder import Decoder
from .llama import attention, decoder, pre_norm, rms_norm
from .registry import Family, Keys, register


def config(keys: Keys) -> Decoder.Config:
    norm = rms_norm(keys)
    bias = keys.get("attention_bias", False)
    attn = attention(keys, bias=bias, out_bias=bias, out_norm=norm)
    ffn = GLU.Config(hidden=keys["intermediate_size"], act=keys.activation(default="relu2"), norm=norm)
    keys.inert("auto_map")
    return decoder(keys, [pre_norm(attn, ffn, norm)] * keys["num_hidden_layers"])


def rules(keys: Keys) -> list[Rule]:
    layer, ours = "model.layers.{i}.", "layers.{i}."
    return [
        Rename(layer + "self_attn.attn_sub_norm.", ours + "attn.fn.out_norm."),
        Rename(layer + "mlp.ffn_sub_norm.", ours + "ffn.fn.norm."),
        *llama.rules(keys),
    ]


TERNARY = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
B2: dict[str, Any] = llama.size(2560, 6912, 30, 20, 5, **llama.generation(5e5, 4096, 128256)) | {
    "model_type": "bitnet", "hidden_act": "relu2", "tie_word_embeddings": True,
}  # fmt: skip
SIZES = {
    "bitnet-b1.58-2b-4t": {**B2, "quantization_config": {**TERNARY, "quantization_mode": "offline"}},
    "bitnet-b1.58-2b-4t-bf16": {**B2, "quantization_config": {**TERNARY, "quantization_mode": "online"}},
}
register(
    Family(
        name="bitnet", architectures=("BitNetForCausalLM",), config=config, rules=rules, prefix="model.", sizes=SIZES
    )
)

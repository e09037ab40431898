"""GPT-2 (Radford et al. 2019): GPT-1 with the norm before each sublayer and one more at the end, a longer context, and
matrices that end a sublayer smaller at the start, by 1 / sqrt(number of sublayers)."""

from __future__ import annotations

from ..nn.feedforward import MLP
from ..nn.residual import Layer, PreNorm
from ..weights.rules import Rename, Rule
from . import gpt1
from .decoder import Decoder
from .gpt1 import attention, layer_norm, layer_rules, outer_rules, size
from .registry import Family, Keys, register


def config(keys: Keys) -> Decoder.Config:
    return decoder(keys, [None] * keys["n_layer"])


def decoder(keys: Keys, windows: list[int | None]) -> Decoder.Config:
    """The whole model; layer i sees tokens at a distance below `windows[i]`."""
    keys.fixed("add_cross_attention", False, None)
    keys.inert("reorder_and_upcast_attn")  # where the product is scaled, and in which precision it is taken
    layers, dropout = [layer(keys, i, window) for i, window in enumerate(windows)], keys.get("embd_pdrop", 0.1)
    dim, context = keys["n_embd"], keys.get("n_positions", 1024)
    return gpt1.decoder(keys, layers, dim=dim, context=context, norm=layer_norm(keys), dropout=dropout)


def layer(keys: Keys, i: int, window: int | None) -> Layer:
    norm, dropout = layer_norm(keys), keys.get("resid_pdrop", 0.1)
    ffn = MLP.Config(
        hidden=keys.get("n_inner", 4 * keys["n_embd"]), act=keys.activation("activation_function", "gelu_new")
    )
    attn = attention(keys, scale=scale(keys, i), window=window)
    return {
        "attn": PreNorm.Config(fn=attn, norm=norm, dropout=dropout),
        "ffn": PreNorm.Config(fn=ffn, norm=norm, dropout=dropout),
    }


def scale(keys: Keys, i: int) -> float | None:
    """What scores of layer i are multiplied by; None: 1 / sqrt(head_dim), as every published size has it."""
    scaled, by_layer = keys.get("scale_attn_weights", True), keys.get("scale_attn_by_inverse_layer_idx", False)
    if scaled and not by_layer:
        return None
    base: float = keys.quotient("n_embd", "n_head") ** -0.5 if scaled else 1.0
    return base / (i + 1) if by_layer else base


def rules(keys: Keys) -> list[Rule]:
    final = Rename("transformer.ln_f.", "norm.")
    return [*outer_rules(keys, "wte", "wpe"), *layer_rules(keys["n_embd"]), final]


COMMON = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "activation_function": "gelu_new"}
COMMON |= {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}
SIZES = {
    "gpt2": COMMON | size(768, 12, 12),
    "gpt2-medium": COMMON | size(1024, 24, 16),
    "gpt2-large": COMMON | size(1280, 36, 20),
    "gpt2-xl": COMMON | size(1600, 48, 25),
}
GPT2 = Family(
    name="gpt2", architectures=("GPT2LMHeadModel",), config=config, rules=rules, prefix="transformer.", sizes=SIZES
)
register(GPT2)

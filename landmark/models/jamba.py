"""Jamba (Lieber et al. 2024) and Jamba 1.5: one layer of attention without positions to seven of Mamba, and experts in
every second feed-forward."""

from __future__ import annotations

from typing import Any

from ..config import ModuleConfig
from ..nn.mamba import Mamba
from ..nn.moe import MoE
from ..nn.residual import Layer, PreNorm
from ..nn.router import SoftmaxTopK
from ..weights.rules import Rename, Rule
from .decoder import Decoder
from .llama import attention, decoder, glu, rms_norm, size
from .llama import rules as llama_rules
from .mamba import mixer_rules, rank
from .moe_keys import PROJECTIONS, balance, expert_rules
from .registry import Family, Keys, register

MAMBA_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")


def every(keys: Keys, kind: str, period: int, offset: int) -> list[bool]:
    """Which layers are of a kind: those at `offset` in each period; the two numbers are the family's defaults."""
    period, offset = keys.get(f"{kind}_layer_period", period), keys.get(f"{kind}_layer_offset", offset)
    if not 0 <= offset < period:
        raise ValueError(f"config.json: {kind}_layer_offset = {offset} must be below {kind}_layer_period = {period}")
    return [i % period == offset for i in range(keys["num_hidden_layers"])]


def attends(keys: Keys) -> list[bool]:
    return every(keys, "attn", 8, 4)


def mamba(keys: Keys) -> Mamba.Config:
    return Mamba.Config(
        expand=keys.get("mamba_expand", 2),
        state=keys.get("mamba_d_state", 16),
        conv=keys.get("mamba_d_conv", 4),
        rank=rank(keys, "mamba_dt_rank"),
        bias=keys.get("mamba_proj_bias", False),
        conv_bias=keys.get("mamba_conv_bias", True),
        norm=rms_norm(keys),
    )


def config(keys: Keys) -> Decoder.Config:
    keys.fixed("hidden_act", "silu")
    keys.fixed("mamba_inner_layernorms", True)
    keys.inert("use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep", "sliding_window")
    keys.inert("calc_logits_for_entire_prompt", "auto_map")
    sparse = every(keys, "expert", 2, 1)
    active, experts = keys.get("num_experts_per_tok", 2), keys.get("num_experts", 16)
    norm, dense = rms_norm(keys), glu(keys)
    router = SoftmaxTopK.Config(renormalise=False, balance=balance(keys, active, sum(sparse)))
    moe: ModuleConfig = dense
    if experts > 1:
        moe = MoE.Config(experts=experts, active=active, hidden=dense.hidden, act=dense.act, router=router)
    attn, recurrent = (
        PreNorm.Config(fn=attention(keys, rope=None), norm=norm),
        PreNorm.Config(fn=mamba(keys), norm=norm),
    )
    ffns = [PreNorm.Config(fn=moe if is_sparse else dense, norm=norm) for is_sparse in sparse]
    layers: list[Layer] = [
        {"attn": attn, "ffn": ffn} if is_attention else {"mamba": recurrent, "ffn": ffn}
        for is_attention, ffn in zip(attends(keys), ffns, strict=True)
    ]
    return decoder(keys, layers)


def rules(keys: Keys) -> list[Rule]:
    theirs, ours, ffn = "model.layers.{i}.mamba.", "layers.{i}.mamba.fn.", "model.layers.{i}.feed_forward."
    experts, names = keys.get("num_experts", 16), ["attn" if it else "mamba" for it in attends(keys)]
    return [
        *(Rename(f"model.layers.{i}.input_layernorm.", f"layers.{i}.{name}.norm.") for i, name in enumerate(names)),
        *(Rename(f"{theirs}{name}.", f"{ours}norms.{n}.") for n, name in enumerate(MAMBA_NORMS)),
        *mixer_rules(theirs, ours, keys.get("mamba_expand", 2) * keys["hidden_size"]),
        *(expert_rules(experts, theirs=ffn, router="router") if experts > 1 else []),
        *(Rename(f"{ffn}{name}.", "layers.{i}.ffn.fn." + own + ".") for name, own in PROJECTIONS.items()),
        Rename("model.final_layernorm.", "norm."),
        *llama_rules(keys, norms={"pre_ff_layernorm": "ffn.norm"}),
    ]


COMMON: dict[str, Any] = {"model_type": "jamba", "vocab_size": 65536, "max_position_embeddings": 262144}
SIZES = {
    "jamba-v0.1": size(4096, 14336, 32, 32, 8, **COMMON),
    "jamba-1.5-mini": size(4096, 14336, 32, 32, 8, **COMMON),
    "jamba-1.5-large": size(8192, 24576, 72, 64, 8, **COMMON, mamba_dt_rank=512),
}
register(
    Family(name="jamba", architectures=("JambaForCausalLM",), config=config, rules=rules, prefix="model.", sizes=SIZES)
)

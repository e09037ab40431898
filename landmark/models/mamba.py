"""Mamba (Gu and Dao 2023): layers of one sublayer, which mixes tokens and gates channels at once."""

from __future__ import annotations

from typing import Any

from ..config import ModuleConfig
from ..nn.embedding import Embedding, Head
from ..nn.mamba import Mamba, StepInit
from ..nn.norm import RMSNorm
from ..nn.residual import PreNorm
from ..weights.rules import Drop, Flatten, Rename, Rule
from .decoder import Decoder
from .registry import Family, Keys, register


def rank(keys: Keys, key: str) -> int:
    """How many numbers say the steps; "auto" is a sixteenth of the width."""
    said, auto = keys.get(key, "auto"), -(-keys["hidden_size"] // 16)
    return auto if said == "auto" else int(said)


def steps(keys: Keys) -> StepInit:
    """How step sizes begin."""
    keys.inert("time_step_scale", "time_step_init_scheme", "rescale_prenorm_residual")
    return StepInit(
        low=keys.get("time_step_min", 0.001),
        high=keys.get("time_step_max", 0.1),
        floor=keys.get("time_step_floor", 1e-4),
    )


def decoder(keys: Keys, mixer: ModuleConfig, *, tied: bool) -> Decoder.Config:
    """Layers of `mixer` alone, each behind a norm; `tied` is the family's default."""
    norm, vocab = RMSNorm.Config(eps=keys.get("layer_norm_epsilon", 1e-5)), keys["vocab_size"]
    keys.fixed("hidden_act", "silu")
    # float32 residuals in a bfloat16 model round less, and the others say which kernels run or repeat other keys
    keys.inert("residual_in_fp32", "use_mambapy", "use_associative_scan", "intermediate_size", "d_inner", "d_model")
    keys.inert("n_layer", "fused_add_norm", "pad_vocab_size_multiple", "ssm_cfg")
    keys.fixed("rms_norm", True)
    return Decoder.Config(
        dim=keys["hidden_size"],
        embed=Embedding.Config(vocab=vocab),
        layers=({"mixer": PreNorm.Config(fn=mixer, norm=norm)},) * keys["num_hidden_layers"],
        norm=norm,
        head=Head.Config(vocab=vocab, tied=keys.get("tie_word_embeddings", tied)),
    )


def config(keys: Keys) -> Decoder.Config:
    mixer = Mamba.Config(
        expand=keys.get("expand", 2),
        state=keys.get("state_size", 16),
        conv=keys.get("conv_kernel", 4),
        rank=rank(keys, "time_step_rank"),
        bias=keys.get("use_bias", False),
        conv_bias=keys.get("use_conv_bias", True),
        steps=steps(keys),
    )
    return decoder(keys, mixer, tied=True)


def mixer_rules(theirs: str, ours: str, channels: int) -> list[Rule]:
    """The tensors of one Mamba layer; a convolution is stored [channels, 1, taps]."""
    names = {"in_proj": "inner", "x_proj": "select", "dt_proj": "step", "out_proj": "out"}
    return [
        Flatten(theirs + "conv1d.weight", ours + "conv.weight", channels),
        Rename(theirs + "conv1d.bias", ours + "conv.bias"),
        *(Rename(f"{theirs}{name}.", f"{ours}{own}.") for name, own in names.items()),
        *(Rename(theirs + name, ours + name) for name in ("A_log", "D")),
    ]


def body_rules(keys: Keys, *, tied: bool) -> list[Rule]:
    """All but the mixers; files older than transformers 4.39 call the table `embedding`."""
    layer = "backbone.layers.{i}."
    tied = keys.get("tie_word_embeddings", tied)
    return [
        *([Drop("lm_head.weight", same_as="backbone.embeddings.weight")] if tied else []),
        Rename("backbone.embeddings.", "embed.tokens."),
        Rename("backbone.embedding.", "embed.tokens."),
        Rename("lm_head.weight", "head.linear.weight"),
        Rename(layer + "norm.", "layers.{i}.mixer.norm."),
        Rename("backbone.norm_f.", "norm."),
    ]


def rules(keys: Keys) -> list[Rule]:
    channels = keys.get("expand", 2) * keys["hidden_size"]
    mixer = mixer_rules("backbone.layers.{i}.mixer.", "layers.{i}.mixer.fn.", channels)
    return [*mixer, *body_rules(keys, tied=True)]


def size(dim: int, layers: int) -> dict[str, Any]:
    return {"model_type": "mamba", "hidden_size": dim, "num_hidden_layers": layers, "vocab_size": 50280}


SIZES = {
    "mamba-130m": size(768, 24), "mamba-370m": size(1024, 48), "mamba-790m": size(1536, 48),
    "mamba-1.4b": size(2048, 48), "mamba-2.8b": size(2560, 64),
}  # fmt: skip
register(
    Family(
        name="mamba", architectures=("MambaForCausalLM",), config=config, rules=rules, prefix="backbone.", sizes=SIZES
    )
)

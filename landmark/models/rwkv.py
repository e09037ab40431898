"""RWKV-4 (Peng et al. 2023, 2305.13048) as transformers writes it; Eagle and Finch (2404.05892) and RWKV-7 "Goose"
(2503.14456) under the names that their authors' files use, with a config.json of our own.

A text of any length may be read; `context_length` is that of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import ModuleConfig
from ..nn.channel_mix import RWKV4ChannelMix, RWKV6ChannelMix, RWKV7ChannelMix
from ..nn.embedding import Embedding, Head
from ..nn.norm import LayerNorm
from ..nn.residual import Layer, PreNorm
from ..nn.rwkv4 import RWKV4
from ..nn.rwkv5 import RWKV5, RWKV6
from ..nn.rwkv7 import RWKV7
from ..weights.rules import Drop, OneToOne, Rename, Rule, Transpose
from .base import Init
from .decoder import Decoder
from .registry import Family, Keys, register


class Rows(Rule):
    """Vectors stored [1, 1, n] that are the rows of one matrix here."""

    def __init__(self, theirs: Sequence[str], ours: str) -> None:
        self.theirs, self.ours = tuple(theirs), (ours,)

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat([t.view(1, -1) for t in tensors])]

    def inverse(self, tensors: list[Tensor]) -> list[Tensor]:
        return [row[None, None] for row in tensors[0]]


class Vector(OneToOne):
    """A vector stored [1, 1, n]."""

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t.flatten() for t in tensors]

    def inverse(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t[None, None] for t in tensors]


def decoder(keys: Keys, mixers: Sequence[ModuleConfig], channel: ModuleConfig) -> Decoder.Config:
    dim, vocab = keys["hidden_size"], keys["vocab_size"]
    norm = LayerNorm.Config(eps=keys.get("layer_norm_epsilon", 1e-5))
    keys.inert("context_length", "max_position_embeddings")

    def layer(mixer: ModuleConfig) -> Layer:
        return {"time": PreNorm.Config(fn=mixer, norm=norm), "channel": PreNorm.Config(fn=channel, norm=norm)}

    return Decoder.Config(
        dim=dim,
        embed=Embedding.Config(vocab=vocab, norm=norm),
        layers=tuple(map(layer, mixers)),
        norm=LayerNorm.Config(),
        head=Head.Config(vocab=vocab, tied=keys.get("tie_word_embeddings", False)),
        init=Init(std=0.5 * dim**-0.5, embedding=1e-4, residual=False),
    )


def outer_rules(body: str = "", emb: str = "emb", first: str = "ln0") -> list[Rule]:
    """What all generations name alike, but for `body`, which stands before all names."""
    return [
        Rename(f"{body}{emb}.weight", "embed.tokens.weight"),
        Rename(f"{body}blocks.0.{first}.", "embed.norm."),
        Rename(f"{body}blocks.{{i}}.ln1.", "layers.{i}.time.norm."),
        Rename(f"{body}blocks.{{i}}.ln2.", "layers.{i}.channel.norm."),
        Rename(f"{body}ln_out.", "norm."),
        Rename("head.weight", "head.linear.weight"),
    ]


def renamed(theirs: str, ours: str, names: str) -> list[Rule]:
    """ "a=b ..." - everything of one name under another, below two prefixes."""
    pairs = (pair.split("=") for pair in names.split())
    return [Rename(theirs + a, ours + b) for a, b in pairs]


ATT, FFN = "blocks.{i}.att.", "blocks.{i}.ffn."
TIME, CHANNEL = "layers.{i}.time.fn.", "layers.{i}.channel.fn."
MATRICES = "receptance.=r. key.=k. value.=v. output.=out."
CHANNEL_MATRICES = "key.=up. value.=down. receptance.=gate."


# RWKV-4, as transformers has it


def config4(keys: Keys) -> Decoder.Config:
    """`rescale_every` halves the stream in half precision, lest it overflow; what is computed is the same."""
    keys.inert("rescale_every")
    mixer = RWKV4.Config(inner=keys.get("attention_hidden_size"))
    channel = RWKV4ChannelMix.Config(hidden=keys.get("intermediate_size"))
    return decoder(keys, [mixer] * keys["num_hidden_layers"], channel)


def rules4(keys: Keys) -> list[Rule]:
    att, ffn = "rwkv.blocks.{i}.attention.", "rwkv.blocks.{i}.feed_forward."
    tied = [Drop("head.weight", same_as="rwkv.embeddings.weight")] if keys.get("tie_word_embeddings", False) else []
    return tied + rules_of_4(att, ffn, ("key", "value", "receptance"), outer_rules("rwkv.", "embeddings", "pre_ln"))


def authors_rules4(keys: Keys) -> list[Rule]:
    """Of the authors' own files."""
    return rules_of_4(ATT, FFN, ("k", "v", "r"), outer_rules())


def rules_of_4(att: str, ffn: str, mixes: tuple[str, str, str], outer: list[Rule]) -> list[Rule]:
    k, v, r = (f"time_mix_{name}" for name in mixes)
    return [
        *outer,
        Rows([att + k, att + v, att + r], TIME + "shift.weight"),
        *renamed(att, TIME, "time_decay=decay time_first=bonus " + MATRICES),
        Rows([ffn + k, ffn + r], CHANNEL + "shift.weight"),
        *renamed(ffn, CHANNEL, CHANNEL_MATRICES),
    ]


# RWKV-5, 5.2 in the authors' count


def config5(keys: Keys) -> Decoder.Config:
    mixer = RWKV5.Config(head_dim=keys.get("head_size", 64))
    return decoder(keys, [mixer] * keys["num_hidden_layers"], RWKV4ChannelMix.Config(hidden=keys["intermediate_size"]))


def rules5(keys: Keys) -> list[Rule]:
    return [
        *outer_rules(),
        Rows([f"{ATT}time_mix_{name}" for name in "kvrg"], TIME + "shift.weight"),
        *renamed(ATT, TIME, "time_decay=decay time_faaaa=bonus gate.=gate. ln_x.=norm. " + MATRICES),
        Rows([f"{FFN}time_mix_{name}" for name in "kr"], CHANNEL + "shift.weight"),
        *renamed(FFN, CHANNEL, CHANNEL_MATRICES),
    ]


# RWKV-6


def config6(keys: Keys) -> Decoder.Config:
    mixer = RWKV6.Config(
        head_dim=keys.get("head_size", 64), mix_rank=keys.get("mix_rank", 32), decay_rank=keys.get("decay_rank", 64)
    )
    return decoder(keys, [mixer] * keys["num_hidden_layers"], RWKV6ChannelMix.Config(hidden=keys["intermediate_size"]))


def rules6(keys: Keys) -> list[Rule]:
    return [
        *outer_rules(),
        Rows([f"{ATT}time_maa_{name}" for name in "xwkvrg"], TIME + "shift.weight"),
        Transpose(ATT + "time_maa_w1", TIME + "mix_down.weight"),
        Rename(ATT + "time_maa_w2", TIME + "mix_up"),
        Vector(ATT + "time_decay", TIME + "decay.up.bias"),
        Transpose(ATT + "time_decay_w1", TIME + "decay.down.weight"),
        Transpose(ATT + "time_decay_w2", TIME + "decay.up.weight"),
        *renamed(ATT, TIME, "time_faaaa=bonus gate.=gate. ln_x.=norm. " + MATRICES),
        Rows([f"{FFN}time_maa_{name}" for name in "kr"], CHANNEL + "shift.weight"),
        *renamed(FFN, CHANNEL, CHANNEL_MATRICES),
    ]


# RWKV-7


def config7(keys: Keys) -> Decoder.Config:
    """`first_value_map`: whether the first layer too holds a map for mixing in its values, which is of no effect."""
    ranks = {name: keys.get(name) for name in ("decay_rank", "rate_rank", "gate_rank")}
    head_dim, count = keys.get("head_size", 64), keys["num_hidden_layers"]
    mixer = RWKV7.Config(head_dim=head_dim, value_rank=keys.get("value_rank"), **ranks)
    first = (
        mixer if keys.get("first_value_map", False) else RWKV7.Config(head_dim=head_dim, value_residual=False, **ranks)
    )
    channel = RWKV7ChannelMix.Config(hidden=keys["intermediate_size"])
    return decoder(keys, [first, *[mixer] * (count - 1)], channel)


def rules7(keys: Keys) -> list[Rule]:
    maps: list[Rule] = []
    for theirs, ours in (("w", "decay"), ("a", "rate"), ("v", "value"), ("g", "gate")):
        maps += [
            Vector(f"{ATT}{theirs}0", f"{TIME}{ours}.up.bias"),
            Transpose(f"{ATT}{theirs}1", f"{TIME}{ours}.down.weight"),
            Transpose(f"{ATT}{theirs}2", f"{TIME}{ours}.up.weight"),
        ]
    return [
        *outer_rules(),
        Rows([f"{ATT}x_{name}" for name in "rwkvag"], TIME + "shift.weight"),
        *maps,
        Vector(ATT + "k_k", TIME + "remove"),
        Vector(ATT + "k_a", TIME + "replace"),
        *renamed(ATT, TIME, "r_k=bonus ln_x.=norm. " + MATRICES),
        Rows([FFN + "x_k"], CHANNEL + "shift.weight"),
        *renamed(FFN, CHANNEL, CHANNEL_MATRICES),
    ]


def size(layers: int, dim: int, hidden: int, *, vocab: int = 65536, context: int = 4096, **more: Any) -> dict[str, Any]:
    shape = {"hidden_size": dim, "num_hidden_layers": layers, "intermediate_size": hidden, "vocab_size": vocab}
    return {**shape, "context_length": context, **more}


PILE: dict[str, Any] = {"vocab": 50277, "context": 1024, "model_type": "rwkv"}
SHAPES = {"0.4b": (24, 1024), "1.5b": (24, 2048), "3b": (32, 2560), "7b": (32, 4096)}
FINCH: dict[str, Any] = {"model_type": "rwkv6", "head_size": 64}
GOOSE: dict[str, Any] = {"model_type": "rwkv7", "head_size": 64}
SIZES4 = {
    f"rwkv-4-{name}": size(layers, dim, 4 * dim, **PILE)
    for name, layers, dim in (
        ("169m", 12, 768), ("430m", 24, 1024), ("1.5b", 24, 2048), ("3b", 32, 2560), ("7b", 32, 4096),
        ("14b", 40, 5120),
    )
}  # fmt: skip
SIZES5 = {
    f"rwkv-5-{name}": size(layers, dim, dim * 7 // 2, model_type="rwkv5", head_size=64)
    for name, (layers, dim) in SHAPES.items()
}
SIZES6 = {
    "rwkv-6-1.6b": size(24, 2048, 7168, **FINCH),
    "rwkv-6-3b": size(32, 2560, 8960, **FINCH),
    "rwkv-6-7b": size(32, 4096, 14336, mix_rank=64, decay_rank=128, **FINCH),
}
SIZES7 = {
    f"rwkv-7-{name}": size(
        layers, dim, 4 * dim, decay_rank=rate, rate_rank=rate, value_rank=value, gate_rank=gate, **GOOSE
    )
    for name, layers, dim, rate, value, gate in (
        ("0.1b", 12, 768, 64, 32, 128), ("0.4b", 24, 1024, 64, 32, 128), ("1.5b", 24, 2048, 96, 64, 256),
        ("2.9b", 32, 2560, 96, 64, 320),
    )
}  # fmt: skip
register(Family("rwkv", ("RwkvForCausalLM",), config4, rules4, prefix="rwkv.", sizes=SIZES4))
register(Family("rwkv5", ("RWKV-x052",), config5, rules5, sizes=SIZES5))
register(Family("rwkv6", ("RWKV-x060",), config6, rules6, sizes=SIZES6))
register(Family("rwkv7", ("RWKV-x070",), config7, rules7, sizes=SIZES7))

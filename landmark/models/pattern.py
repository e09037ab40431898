"""Hybrids in one line: which mixers and feed-forwards the layers of a decoder have, in which order.

    pattern("4*(7*mamba2 + attention)", dim=512, vocab=32000).build()
    pattern("12*rwkv7/moe", dim=512, vocab=32000, parts={"moe": {"experts": 16}})

A layer is `mixer` or `mixer/ffn`; `n*` repeats what follows, `+` strings layers together, and brackets group;
`(...)/ffn` gives a feed-forward to every layer of a group that names none. A mixer without one has what usually follows
it, and `mixer/none` has none. Names are those of `MIXERS` and `FFNS`, with sizes that follow from `dim`, or of `parts`:
tables that change fields of a part (and of configs in it), that make another one `like` it, or that are a config with a
`type`.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import Config, ModelConfig, ModuleConfig, fields, from_dict, nearest
from ..nn.attention import Attention
from ..nn.embedding import Embedding, Head
from ..nn.linear import LinearConfig
from ..nn.norm import NormConfig, RMSNorm
from ..nn.residual import Layer, PreNorm
from ..nn.rope import Rope
from .base import Init, Unfilled
from .decoder import Decoder

MOST_LAYERS = 10_000
NONE = "none"  # in place of a feed-forward
Parts = Mapping[str, Mapping[str, Any] | ModuleConfig]


@dataclass(frozen=True)
class Sizes:
    """The usual sizes of a layer of width `dim`."""

    dim: int

    @property
    def head_dim(self) -> int:
        """64, or less if there would be less than four heads."""
        for width in (64, 32, 16, 8):
            if self.dim % width == 0 and self.dim // width >= 4:
                return width
        raise ValueError(f"a width of {self.dim} has no four heads of a usual width; choose a multiple of 64, or of 32")

    @property
    def heads(self) -> int:
        return self.dim // self.head_dim

    @property
    def kv_heads(self) -> int:
        """A fourth of the heads, where they go into four groups."""
        return self.heads // 4 if self.heads % 4 == 0 else self.heads

    def hidden(self, times: float) -> int:
        """About `times` the width, in whole multiples of 32."""
        return math.ceil(self.dim * times / 32) * 32


@dataclass(frozen=True)
class Part:
    """Where a component is (module of landmark.nn, class), and the fields that follow from sizes; the others have their
    defaults. `ffn`: what usually follows a mixer."""

    module: str
    name: str
    fields: Callable[[Sizes], Mapping[str, Any]] = lambda s: {}
    ffn: str = "glu"

    @property
    def config(self) -> type[ModuleConfig]:
        component = getattr(importlib.import_module(f"..nn.{self.module}", __package__), self.name)
        cls: type[ModuleConfig] = component.Config
        return cls


def _attention(s: Sizes, **more: Any) -> dict[str, Any]:
    return {"heads": s.heads, "kv_heads": s.kv_heads, "head_dim": s.head_dim, "rope": Rope.Config(), **more}


def _latent(s: Sizes) -> dict[str, Any]:
    d = s.head_dim
    return {"heads": s.heads, "head_dim": d, "v_dim": d, "rope_dim": d // 2, "kv_rank": 4 * d}


def _moe(s: Sizes) -> dict[str, Any]:
    from ..nn.router import SoftmaxTopK

    return {"experts": 8, "active": 2, "hidden": s.hidden(4 / 3), "router": SoftmaxTopK.Config(balance=0.01)}


def _memory(s: Sizes) -> ModuleConfig:
    from ..nn.neural_memory import NeuralMemory

    return NeuralMemory.Config(heads=s.heads)


def _beside_memory(s: Sizes) -> dict[str, Any]:
    from ..nn.persistent import PersistentAttention

    return {"attention": PersistentAttention.Config(**_attention(s, window=512, tokens=16)), "memory": _memory(s)}


def _segments(s: Sizes) -> dict[str, Any]:
    return {"attention": Attention.Config(**_attention(s)), "memory": _memory(s), "segment": 128}


MIXERS: Mapping[str, Part] = {
    "attention": Part("attention", "Attention", _attention),
    "window": Part("attention", "Attention", lambda s: _attention(s, window=512)),
    "latent": Part("latent", "LatentAttention", _latent),
    "mamba": Part("mamba", "Mamba", ffn=NONE),
    "mamba2": Part("mamba2", "Mamba2", lambda s: {"heads": 2 * s.heads, "head_dim": s.head_dim}, ffn=NONE),
    "rwkv4": Part("rwkv4", "RWKV4", ffn="rwkv4-channel"),
    "rwkv5": Part("rwkv5", "RWKV5", lambda s: {"head_dim": s.head_dim}, ffn="rwkv4-channel"),
    "rwkv6": Part("rwkv5", "RWKV6", lambda s: {"head_dim": s.head_dim}, ffn="rwkv6-channel"),
    "rwkv7": Part("rwkv7", "RWKV7", lambda s: {"head_dim": s.head_dim}, ffn="rwkv7-channel"),
    "ttt": Part("ttt", "TTTLinear", lambda s: {"heads": s.heads}),
    "ttt-mlp": Part("ttt", "TTTMLP", lambda s: {"heads": s.heads}),
    "memory": Part("neural_memory", "NeuralMemory", lambda s: {"heads": s.heads}),
    "titans": Part("titans", "MemoryAsContext", _segments),  # the variant of the paper's that recalls most
    "titans-mac": Part("titans", "MemoryAsContext", _segments),
    "titans-mag": Part("titans", "MemoryAsGate", _beside_memory),
    "titans-mal": Part("titans", "MemoryAsLayer", _beside_memory),
}
FFNS: Mapping[str, Part] = {
    "glu": Part("feedforward", "GLU", lambda s: {"hidden": s.hidden(8 / 3)}),
    "mlp": Part("feedforward", "MLP", lambda s: {"hidden": s.hidden(4)}),
    "moe": Part("moe", "MoE", _moe),
    "rwkv4-channel": Part("channel_mix", "RWKV4ChannelMix"),
    "rwkv6-channel": Part("channel_mix", "RWKV6ChannelMix", lambda s: {"hidden": s.hidden(3.5)}),
    "rwkv7-channel": Part("channel_mix", "RWKV7ChannelMix"),
    "peer": Part("peer", "PEER", lambda s: {"experts": 128 * 128}),
}


def pattern(
    text: str, *, dim: int, vocab: int, parts: Parts | None = None, norm: NormConfig = RMSNorm.Config(),
    tied: bool = True, context: int | None = None, init: Init = Init(), linear: LinearConfig | None = None,
) -> Decoder.Config:  # fmt: skip
    """The decoder that a pattern describes. Raises ValueError, naming place, part or field, for what makes no sense."""
    made = {}

    def sublayer(name: str, kinds: Mapping[str, Part], what: str) -> PreNorm.Config:
        if name not in made:
            made[name] = PreNorm.Config(fn=_config(name, kinds, parts or {}, dim, what), norm=norm)
        return made[name]

    layers: list[Layer] = []
    for mixer, ffn in parse(text):
        layer: dict[str, ModuleConfig] = {"mixer": sublayer(mixer, MIXERS, "mixer")}
        ffn = ffn or _usual_ffn(mixer, parts or {})
        if ffn != NONE:
            layer["ffn"] = sublayer(ffn, FFNS, "feed-forward")
        layers.append(layer)
    for name in (parts or {}).keys() - made.keys():
        raise ValueError(f"the pattern {text!r} has no part {name!r}{nearest(name, made)}")
    return Decoder.Config(
        dim=dim, embed=Embedding.Config(vocab=vocab), layers=tuple(layers), norm=norm, context=context,
        head=Head.Config(vocab=vocab, tied=tied), init=init, linear=linear,
    )  # fmt: skip


class Pattern(ModelConfig):
    """`pattern` as a table of a TOML file; `parts` are tables by name."""

    pattern: str
    dim: int = 512
    vocab_size: int = 32_768
    parts: Parts = field(default_factory=dict)
    norm: NormConfig = RMSNorm.Config()
    tied: bool = True
    context: int | None = None
    init: Init = Init()
    linear: LinearConfig | None = None

    def check(self) -> None:
        super().check()
        if not isinstance(self.parts, Mapping):
            raise ValueError(f"Pattern.parts is {self.parts!r}; it must be a table by name")
        self.config()

    def config(self) -> Decoder.Config:
        return pattern(
            self.pattern, dim=self.dim, vocab=self.vocab_size, parts=self.parts, norm=self.norm, tied=self.tied,
            context=self.context, init=self.init, linear=self.linear,
        )  # fmt: skip

    def build(self) -> Decoder:
        return self.config().build()


def is_pattern(spec: str) -> bool:
    """Whether a text can only be a pattern, and no name of a model."""
    return any(sign in spec for sign in "*+(")


def parse(text: str) -> list[tuple[str, str | None]]:
    """(mixer, feed-forward or None) of every layer. Raises ValueError that names the place of what does not parse."""
    if not isinstance(text, str):
        raise ValueError(f"a pattern is a text such as '7*mamba2 + attention', not {text!r}")
    return _Parser(text).whole()


class _Parser:
    """pattern = term {"+" term};  term = [count "*"] (name | "(" pattern ")") ["/" name]"""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.tokens: list[tuple[str, int]] = []
        for match in re.finditer(r"\s*(\d+(?![\w-])|[a-zA-Z_][\w.-]*|[-\w]+|\S)", text):
            self.tokens.append((match[1], match.start(1)))
        self.tokens.append(("", len(text)))

    @property
    def next(self) -> str:
        return self.tokens[self.at][0]

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1][0]

    def error(self, wanted: str) -> ValueError:
        token, place = self.tokens[self.at]
        found = f"{token!r} at character {place + 1}" if token else "the end"
        return ValueError(f"the pattern {self.text!r} does not parse: {wanted} should stand where {found} is")

    def whole(self) -> list[tuple[str, str | None]]:
        layers = self.terms()
        if self.next:
            raise self.error("'+' or the end")
        return layers

    def terms(self) -> list[tuple[str, str | None]]:
        layers = self.term()
        while self.next == "+":
            self.take()
            layers = layers + self.term()
        return layers

    def term(self) -> list[tuple[str, str | None]]:
        count, place = 1, self.at
        if re.fullmatch(r"-?\d+", self.next):
            count = int(self.take())
            if count < 1:
                self.at = place
                raise self.error("a count of at least 1")
            if self.next != "*":
                raise self.error("'*'")
            self.take()
        if self.next == "(":
            self.take()
            layers = self.terms()
            if self.next != ")":
                raise self.error("'+' or ')'")
            self.take()
        else:
            layers = [(self.name("a mixer, a count or '('"), None)]
        if self.next == "/":
            self.take()
            ffn = self.name("a feed-forward")
            layers = [(mixer, own or ffn) for mixer, own in layers]
        if count * len(layers) > MOST_LAYERS:
            raise ValueError(f"the pattern {self.text!r} makes more than {MOST_LAYERS:,} layers; choose smaller counts")
        return layers * count

    def name(self, wanted: str) -> str:
        if not re.fullmatch(r"[a-zA-Z_][\w.-]*", self.next):
            raise self.error(wanted)
        return self.take()


def _known(name: str, kinds: Mapping[str, Part], parts: Parts, what: str) -> tuple[Part | None, Mapping[str, Any]]:
    """What a name stands for, and which of its fields are changed; no part for a table that is a config of its own."""
    own = parts.get(name, {})
    if isinstance(own, Config):
        return None, {"config": own}
    if not isinstance(own, Mapping):
        raise ValueError(f"the part {name!r} of the pattern is {own!r}; it must be a table of fields")
    if "type" in own:
        return None, own
    like = own.get("like", name)
    if like not in kinds:
        listed = ", ".join(kinds)
        raise ValueError(f"there is no {what} {like!r}{nearest(like, [*kinds, *parts])}; there are {listed}")
    return kinds[like], {key: value for key, value in own.items() if key != "like"}


def _config(name: str, kinds: Mapping[str, Part], parts: Parts, dim: int, what: str) -> ModuleConfig:
    part, own = _known(name, kinds, parts, what)
    try:
        if part is None:
            config = own["config"] if "config" in own else from_dict(own)
        else:
            config = _changed(part.config, part.fields(Sizes(dim)), own)
        if not isinstance(config, ModuleConfig):
            raise ValueError(f"{config!r} is no config of a component")
        with torch.device("meta"), Unfilled():
            config.build(dim)  # what does not fit the width says so here
    except ValueError as error:
        raise ValueError(f"the part {name!r} of the pattern: {error}") from error
    return config


def _changed(cls: type[Config], usual: Mapping[str, Any], own: Mapping[str, Any]) -> Config:
    """A config of usual fields with some of one's own; a table without a type changes the usual one's fields."""
    values, known = dict(usual), {f.name: f for f in fields(cls)}
    for key, value in own.items():
        if key not in known:
            raise ValueError(f"{cls.type_name} has no field {key!r}{nearest(key, known)}")
        before = values.get(key, known[key].default)
        if isinstance(before, Config) and isinstance(value, Mapping) and "type" not in value:
            fresh = {f.name: getattr(before, f.name) for f in fields(before)}
            values[key] = _changed(type(before), fresh, value)
        else:
            values[key] = from_dict(value)
    return cls(**values)


def _usual_ffn(mixer: str, parts: Parts) -> str:
    part, _ = _known(mixer, MIXERS, parts, "mixer")
    return NONE if part is None else part.ffn

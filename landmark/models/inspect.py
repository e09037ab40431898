"""What a model costs, counted from the structure of the built model: no weights are read, the meta device will do.

A module says what its structure does not: `mixing_flops(context)`, where tokens meet other than through weights, and
`active_parameters()`, where a token passes only some of the weights (experts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..ctx import Bounds, Memory
from ..nn.attention import Attention, CrossAttention
from ..nn.bitlinear import Ternary
from ..nn.codes import CodedEmbedding, Codes
from ..nn.disentangled import DisentangledAttention
from ..nn.embedding import Embedding, Head
from ..nn.heads import SequenceHead
from ..nn.linear import Packed, count
from ..nn.mtp import Drafts
from ..nn.residual import Block, Repeat
from .backbone import Backbone
from .base import Model
from .decoder import Decoder
from .encoder_decoder import EncoderDecoder

PLACES = 64  # of a text, where what a token costs is counted for its mean
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}


@runtime_checkable
class Mixer(Protocol):
    def mixing_flops(self, context: int) -> int:
        """FLOPs per token beyond the weights', for a token that sees `context` tokens."""


@runtime_checkable
class Sparse(Protocol):
    def active_parameters(self) -> int:
        """How many of its parameters a token passes."""


@dataclass(frozen=True)
class Figures:
    """Parameters, FLOPs per token and bytes. A token of an encoder-decoder is one of the source and one of the target.

    `embedding`: the tables of the embedding, and a head of its own. `flops`: forward, for a token that sees `context`
    tokens; `training_flops`: forward and backward, the mean over texts of so many. `cache_per_token`: what each token
    adds to the decoding state of a sequence while all windows are longer, and `cache_growth` after `context` tokens;
    `cache`: the state at `context` tokens; None where nothing is decoded. `memory`: the weights in each number format,
    without the scales of quantised groups; where linear maps are ternary, also with these in two bits and the rest in
    bfloat16; where they are coded, as they are, all in all.
    """

    parameters: int
    active: int
    embedding: int
    layers: int
    longest: int | None
    context: int
    flops: int
    training_flops: int
    cache_per_token: int | None
    cache_growth: int | None
    cache: int | None
    memory: Mapping[str, int]


def figures(model: Model, *, context: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Figures:
    """The figures of a built model at `context` tokens (None: the longest text it was made for, or 2048).

    `dtype` is that of the decoding state. Raises ValueError for a context below one token.
    """
    longest = longest_text(model)
    context = context if context is not None else longest or 2048
    if context < 1:
        raise ValueError(f"a context of {context} tokens is none; choose at least 1")
    parameters, flops = count(model), forward_flops(model, context)
    ternary = sum(m.ternary_parameters() for m in model.modules() if isinstance(m, Ternary))
    memory = {name: -(-parameters * bits // 8) for name, bits in BITS.items()}
    if ternary:
        memory["ternary"] = ternary // 4 + 2 * (parameters - ternary)
    if any(isinstance(m, Codes) for m in model.modules()):
        memory["coded"] = sum(t.nbytes for t in model.state_dict().values())
    per_token = growth = cache = None
    if isinstance(model, Decoder | EncoderDecoder):
        one, two, cache, beyond = state_bytes(model, dtype, 1, 2, context, context + 1)
        per_token, growth = two - one, beyond - cache
    return Figures(
        parameters=parameters,
        active=parameters - sum(count(m) - m.active_parameters() for m in model.modules() if isinstance(m, Sparse)),
        embedding=embedding_parameters(model),
        layers=depth(model),
        longest=longest,
        context=context,
        flops=flops,
        training_flops=training_flops(model, context),
        cache_per_token=per_token,
        cache_growth=growth,
        cache=cache,
        memory=memory,
    )


def longest_text(model: Model) -> int | None:
    """The longest text, in tokens, that every part of a model was made for."""
    parts = [m.cfg.context for m in model.modules() if isinstance(m, Backbone)]
    return min((context for context in parts if context is not None), default=None)


def embedding_parameters(model: nn.Module) -> int:
    """Tables that are looked up, and heads that own their weight."""
    tables = (m.modules() for m in model.modules() if isinstance(m, Embedding))
    held: set[nn.Module] = {
        table for part in tables for table in part if isinstance(table, nn.Embedding | CodedEmbedding)
    }
    held |= {m.linear for m in model.modules() if isinstance(m, Head) and m.linear is not None}
    weights = {m if isinstance(m, Codes) else m.weight: count(m) for m in held}  # a shared one is one
    return sum(weights.values())


def depth(module: nn.Module) -> int:
    """How many layers a token passes."""
    if isinstance(module, Block):
        return 1
    return _times(module) * sum(depth(child) for child in module.children())


def forward_flops(model: nn.Module, context: int) -> int:
    """FLOPs of a token that sees `context` tokens: two for every weight of the matrices it passes, and its mixing.

    A layer that is passed several times counts as often, a tied head where it is used, and a head that speaks once a
    text, or for drafts, not at all.
    """
    return _flops(model, lambda mixer: mixer.mixing_flops(context), drafts=False)


def training_flops(model: nn.Module, length: int) -> int:
    """FLOPs of training on a token, the mean over texts of `length` tokens: its forward, and twice that backward.

    In causal layers a token sees those before it and itself, in all others the whole text. Drafts count with their use
    of the head; what is computed a second time to save memory does not (Chowdhery et al. 2022, app. B).
    """
    count = min(length, PLACES)
    places = [math.ceil((i + 0.5) * length / count) for i in range(count)]

    def mixing(mixer: Mixer) -> int:
        if isinstance(mixer, CrossAttention | DisentangledAttention) or (
            isinstance(mixer, Attention) and not mixer.cfg.causal
        ):
            return mixer.mixing_flops(length)
        return round(sum(map(mixer.mixing_flops, places)) / count)

    return 3 * _flops(model, mixing, drafts=True)


def _flops(model: nn.Module, mixing: Callable[[Mixer], int], *, drafts: bool) -> int:
    embedding = next((m for m in model.modules() if isinstance(m, Embedding)), None)
    head = next((m for m in model.modules() if isinstance(m, Head)), None)

    def passing(module: nn.Module) -> int:
        if isinstance(module, SequenceHead):
            return 0
        if isinstance(module, Drafts):
            assert head is not None
            return module.depth * passing(head) + sum(map(passing, module.children())) if drafts else 0
        flops = mixing(module) if isinstance(module, Mixer) else 0
        if isinstance(module, Sparse):
            return flops + 2 * module.active_parameters()
        if isinstance(module, Packed) and not isinstance(module, CodedEmbedding):
            flops += 2 * module.packed_parameters()
        elif isinstance(module, nn.Linear):
            flops += 2 * module.weight.numel()
        elif isinstance(module, Head) and module.linear is None:
            flops += 2 * count(module.matrix(embedding))
        return _times(module) * (flops + sum(passing(child) for child in module.children()))

    return passing(model)


@torch.no_grad()
def state_bytes(model: Decoder | EncoderDecoder, dtype: torch.dtype, *lengths: int) -> list[int]:
    """Bytes of the decoding state of one sequence, at each of these lengths in tokens, measured: one layer of each kind
    computes a last token on the meta device, behind a past that is only said to be there."""
    cfg = model.cfg.decoder if isinstance(model, EncoderDecoder) else model.cfg
    kinds = [layer for i, layer in enumerate(cfg.layers) if layer not in cfg.layers[:i]]
    meta, sizes = torch.device("meta"), []
    with meta:
        twin = replace(cfg, layers=tuple(kinds)).build().to(dtype).eval()
    for length in lengths:
        state, memory = twin.new_state(1, length), None
        state.lengths = [length - 1]
        if isinstance(model, EncoderDecoder):
            source = torch.empty(1, length, model.encoder.cfg.dim, dtype=dtype, device=meta)
            memory = Memory(source, Bounds(1, length))
        twin.hidden(torch.empty(1, 1, dtype=torch.long, device=meta), state=state, memory=memory)
        by_kind = [sum(t.nbytes for t in _tensors(part)) for part in state.layers]
        sizes.append(sum(by_kind[kinds.index(layer)] for layer in cfg.layers))
    return sizes


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, dict | list | tuple):
        for item in part.values() if isinstance(part, dict) else part:
            yield from _tensors(item)
    elif part is not None and not isinstance(part, int | Bounds):
        yield from _tensors(vars(part))


def _times(module: nn.Module) -> int:
    return module.times if isinstance(module, Repeat) else 1

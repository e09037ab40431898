"""The small decoder that experiments vary one part of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import ModuleConfig
from ..models.base import Init
from ..models.decoder import Decoder
from ..nn.attention import Attention
from ..nn.embedding import Embedding, Head
from ..nn.feedforward import GLU
from ..nn.norm import RMSNorm
from ..nn.residual import Layer, PreNorm
from ..nn.rope import Rope
from .text import VOCAB


def attention(dim: int, *, head_dim: int = 32, window: int | None = None) -> Attention.Config:
    """Rotary multi-head attention."""
    heads = dim // head_dim
    return Attention.Config(heads=heads, kv_heads=heads, head_dim=head_dim, rope=Rope.Config(), window=window)


def glu(dim: int) -> GLU.Config:
    """SwiGLU with the parameters of a plain feed-forward of four times the width."""
    return GLU.Config(hidden=dim * 8 // 3)


def decoder(
    ffn: ModuleConfig | None = None, *, mixers: Sequence[ModuleConfig] | None = None, dim: int = 96, layers: int = 3,
    vocab: int = VOCAB, tied: bool = False, context: int | None = None, seed: int = 0,
) -> Decoder:  # fmt: skip
    """A pre-norm decoder of width `dim`, initialised from `seed`: `layers` of attention and `ffn`, or one layer for
    each of `mixers`."""
    norm = RMSNorm.Config()
    mixers = mixers if mixers is not None else [attention(dim)] * layers
    ffn = ffn or glu(dim)
    stack: list[Layer] = [
        {"mixer": PreNorm.Config(fn=mixer, norm=norm), "ffn": PreNorm.Config(fn=ffn, norm=norm)} for mixer in mixers
    ]
    config = Decoder.Config(
        dim=dim, embed=Embedding.Config(vocab=vocab), layers=tuple(stack), norm=norm,
        head=Head.Config(vocab=vocab, tied=tied), context=context, init=Init(),
    )  # fmt: skip
    torch.manual_seed(seed)
    return config.build()

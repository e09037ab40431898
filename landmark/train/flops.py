"""Floating-point operations, counted from the structure of a built model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..nn.embedding import Embedding, Head
from ..nn.residual import Repeat


def forward_flops(model: nn.Module) -> Callable[[int], float]:
    """FLOPs per token of a forward pass over sequences of so many tokens.

    Two per entry of every matrix that a token passes through, tied heads and repeated layers counted where they are
    used, and what mixers declare, for a token that sees half of the sequence (Kaplan et al. 2020, sec. 2.1).
    """
    embeddings = [m.tokens.weight for m in model.modules() if isinstance(m, Embedding)]
    times: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, Repeat):
            times |= dict.fromkeys(module.modules(), module.times)
    matrices, mixers = 0, []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            matrices += module.weight.numel() * times.get(module, 1)
        elif isinstance(module, Head) and module.linear is None:
            matrices += embeddings[0].numel()
        mixing = getattr(module, "mixing_flops", None)
        if mixing is not None:
            mixers.append((mixing, times.get(module, 1)))
    return lambda context: 2.0 * matrices + sum(mixing(max(1, context // 2)) * n for mixing, n in mixers)


def training_flops(model: nn.Module) -> Callable[[int], float]:
    """The same of forward and backward: three times the forward pass (recomputation is not counted)."""
    forward = forward_flops(model)
    return lambda context: 3.0 * forward(context)

"""The experts of a few tokens by a C kernel (choose.c): what a router does for a decoded token, in one call."""

from __future__ import annotations

from ctypes import c_char_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..native import Source

Scores = Literal["softmax", "sigmoid", "logit"]

SOURCE = Source(Path(__file__).with_name("choose.c"))
KERNELS = {torch.float32: "choose_f32", torch.bfloat16: "choose_bf16"}
KINDS: dict[Scores, int] = {"softmax": 0, "sigmoid": 1, "logit": 2}
MAX_TOKENS = 16  # beyond them one call an operation costs nothing
_PLAIN = (Tensor, Parameter)
_call = Struct("5P10q2d")  # experts.h's Choice
SIZE = _call.size


@cache
def _kernel(dtype: torch.dtype) -> Any:
    return SOURCE.function(KERNELS[dtype], c_char_p)


def why_not(x: Tensor, weight: Tensor) -> str | None:
    """None if the kernel can run on tokens x [N, dim] and weight [E, dim], else why not."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "it has no gradient"
    if not 0 < len(x) <= MAX_TOKENS:
        return f"it takes 1 to {MAX_TOKENS} tokens, not {len(x)}"
    dtype = x.dtype
    for t in (x, weight):
        if type(t) not in _PLAIN or not t.is_cpu or t.dtype != dtype or dtype not in KERNELS:
            return f"it takes plain tensors of one dtype, float32 or bfloat16, on cpu, not {type(t).__name__} {t.dtype}"
    if not weight.is_contiguous():
        return "the weight is not contiguous"
    if torch.compiler.is_compiling():
        return "compilers do not see through it"
    if torch.is_autocast_enabled("cpu"):
        return "autocast picks the dtype"
    return SOURCE.why_not()


class Rule(NamedTuple):
    """How experts are chosen by the logits x W^T, the `active` of the largest scores, best first, and what they weigh.

    `bias` [E] in float32 is added to scores for the choice alone. With fewer `active_groups` than `groups`, only
    experts of the groups whose `best` largest sum to the most can be chosen. `renormalise`: weights are divided by
    their sum plus `least`. Then they are multiplied by `scale`. `rounded`: logits have x's dtype before they become
    scores. Of "logit" the weight is the sigmoid.
    """

    scores: Scores
    bias: Tensor | None = None
    groups: int = 1
    active_groups: int = 1
    best: int = 1
    renormalise: bool = False
    scale: float = 1.0
    rounded: bool = True
    least: float = 0.0


def choose(x: Tensor, weight: Tensor, active: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """Which experts tokens x [N, dim] pass and what each of them weighs: [N, active] each, the latter in float32, for
    arguments that `why_not` accepts; weight [E, dim]."""
    x = x.contiguous()
    experts = torch.empty((len(x), active), dtype=torch.long)
    weights = torch.empty((len(x), active), dtype=torch.float32)
    places = x.data_ptr(), experts.data_ptr(), weights.data_ptr(), len(x)
    _kernel(x.dtype)(packed(weight, active, rule, *places))
    return experts, weights


def packed(
    weight: Tensor, active: int, rule: Rule, x: int = 0, experts: int = 0, weights: int = 0, tokens: int = 0
) -> bytes:
    """experts.h's Choice; of x, experts and weights their addresses."""
    (number, dim), bias = weight.shape, 0 if rule.bias is None else rule.bias.data_ptr()
    return _call.pack(
        x, weight.data_ptr(), bias, experts, weights, tokens, dim, number, active, KINDS[rule.scores], rule.groups,
        rule.active_groups, rule.best, rule.renormalise, rule.rounded, rule.scale, rule.least,
    )  # fmt: skip


def address(dtype: torch.dtype) -> int:
    """Where the kernel is, for those who call it between their threads."""
    return SOURCE.address(KERNELS[dtype])

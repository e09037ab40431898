"""The experts of a few tokens by a C kernel (choose.c): what a router does for a decoded token, in one call."""

from __future__ import annotations

from ctypes import c_char_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any, Literal

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
_pack = Struct("5P10q2d").pack  # choose.c's Call


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


def choose(
    x: Tensor, weight: Tensor, active: int, scores: Scores, *, bias: Tensor | None = None, groups: int = 1,
    active_groups: int = 1, best: int = 1, renormalise: bool = False, scale: float = 1.0, rounded: bool = True,
    least: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The `active` experts of the largest scores of x W^T, best first, and their weights: [N, active] each, the latter
    in float32, for arguments that `why_not` accepts.

    `bias` [E] in float32 is added to scores for the choice alone. With fewer `active_groups` than `groups`, only
    experts of the groups whose `best` largest sum to the most can be chosen. `renormalise`: weights are divided by
    their sum plus `least`. Then they are multiplied by `scale`. `rounded`: logits have x's dtype before they become
    scores. Of "logit" the weight is the sigmoid.
    """
    x, (number, dim) = x.contiguous(), weight.shape
    experts = torch.empty((len(x), active), dtype=torch.long)
    weights = torch.empty((len(x), active), dtype=torch.float32)
    call = _pack(
        x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), experts.data_ptr(), weights.data_ptr(),
        len(x), dim, number, active, KINDS[scores], groups, active_groups, best, renormalise, rounded, scale, least,
    )  # fmt: skip
    _kernel(x.dtype)(call)
    return experts, weights

"""Activation functions by the field's names."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "gelu_quick", "silu", "sigmoid", "tanh", "identity"]


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al., Primer, 2021)."""
    return F.relu(x).square()


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), exact (Hendrycks and Gimpel, 2016)."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh approximation: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as GPT-1 and GPT-2 use it."""
    return F.gelu(x, approximate="tanh")


def gelu_quick(x: Tensor) -> Tensor:
    """GELU's sigmoid approximation: x sigmoid(1.702 x), as CLIP uses it."""
    return x * torch.sigmoid(1.702 * x)


def identity(x: Tensor) -> Tensor:
    """x itself; a GLU with it is the bilinear layer."""
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": relu2,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "gelu_quick": gelu_quick,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": identity,
}
assert tuple(ACTIVATIONS) == get_args(Activation)


def check_activation(name: str) -> Activation:
    """`name` itself if it is an activation, else a ValueError that proposes the nearest one."""
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(str(name), ACTIVATIONS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown activation {name!r}: did you mean {near!r}? (known: {', '.join(ACTIVATIONS)})")
    return cast(Activation, name)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function called `name`; a ValueError that proposes the nearest name if there is none."""
    return ACTIVATIONS[check_activation(name)]

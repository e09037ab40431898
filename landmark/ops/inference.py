"""Calls that need no gradient: an operator spends five microseconds on its way from Python to Python, which is most of
what one decoded token costs a small layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .operator import Operator


def inference_op(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, which takes plain tensors on the processor and has no gradient; to compilers it is the operator
    landmark::`name`, of which `fake` says the shapes."""
    seen = Operator(name, run, fake)

    def call(*args: Any) -> Any:
        return (seen if torch.compiler.is_compiling() else run)(*args)

    return call


def learns(*arguments: Any) -> bool:
    """Whether a gradient can be asked of what is made of the tensors among these."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments)

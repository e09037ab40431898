"""Operators for calls that need no gradient: torch.library's `custom_op` spends ten microseconds of a call on autograd,
which is most of what one decoded token costs a small layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("landmark", "FRAGMENT")


def inference_op(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator landmark::`name` that runs `run` on the processor, and has no gradient; `fake` says its shapes."""
    _library.define(name + torch.library.infer_schema(run, mutates_args=()))
    _library.impl(name, run, "CPU")
    torch.library.register_fake(f"landmark::{name}", fake, lib=_library)
    return getattr(torch.ops.landmark, name).default


def learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient can be asked of what is made of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

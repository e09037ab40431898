"""Buffers that gather tiny steps, and so stay float32 whatever a model is cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose own buffers `to`, `bfloat16`, `load(dtype=...)` and the like leave in float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new: Any = self._buffers[name]
            if old is not None and new.dtype != torch.float32:
                self._buffers[name] = old.to(new.device, torch.float32)
        return self


def float32_buffers(model: nn.Module) -> set[str]:
    """The names of all such buffers."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, Float32Buffers)
        for name in module._buffers
    }

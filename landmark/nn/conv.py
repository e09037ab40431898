"""A short causal convolution of every channel by itself, as linear-time mixers have before their recurrence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..ctx import Bounds
from ..ops.conv import causal_conv


class ShortConv(nn.Module):
    """Each channel's last `taps` tokens, weighed; initialised as a convolution of torch."""

    def __init__(self, channels: int, taps: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    def room(self, slots: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What a decoding state holds of it: the last taps - 1 tokens of every slot [slots, taps - 1, channels]."""
        channels, taps = self.weight.shape
        return torch.zeros(slots, taps - 1, channels, dtype=dtype, device=device)

    def forward(
        self, x: Tensor, bounds: Bounds, initial: Tensor | None = None, act: Literal["silu"] | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, channels] -> the same, and what the next call's `initial` is."""
        if initial is not None and initial.dtype != x.dtype:
            initial = initial.to(x.dtype)
        return causal_conv(x, self.weight, self.bias, bounds, initial, act)

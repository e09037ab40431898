"""The linear layer: every weight matrix that transforms (adapters, quantisers, parallelism) may wish to find."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.linear import linear


class Linear(nn.Linear):
    """y = x W^T + b. x [..., in] -> [..., out]; the weight is [out, in], as on disk."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

"""The linear layer: every weight matrix that transforms (adapters, quantisers, parallelism) may wish to find."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ..config import Config
from ..ops.linear import linear


class Linear(nn.Linear):
    """y = x W^T + b. x [..., in] -> [..., out]; the weight is [out, in], as on disk."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


CHOOSERS = ("router.linear", "query")  # what picks experts: a choice that rounding would change


class LinearConfig(Config, ABC, abstract=True):
    """What stands for a `Linear` of a layer, such as a quantised one."""

    skip: tuple[str, ...] = CHOOSERS  # ends of the dotted names of those that stay as they are

    @abstractmethod
    def build(self, linear: Linear) -> nn.Module:
        """What takes the place of `linear`, of the same width, bias and dtype; its weights are not taken over."""


def replace_linears(module: nn.Module, config: LinearConfig) -> None:
    """Put what `config` builds in the place of every `Linear` below a module, but for those that it skips."""
    for name, child in list(module.named_modules()):
        if type(child) is Linear and not any(f".{name}".endswith(f".{end}") for end in config.skip):
            module.set_submodule(name, config.build(child))

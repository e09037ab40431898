"""The linear layer: every weight matrix that transforms (adapters, quantisers, parallelism) may wish to find."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every

from ..config import Config
from ..ops.linear import linear
from ..ops.moe import grouped_linear


class Linear(nn.Linear):
    """y = x W^T + b. x [..., in] -> [..., out]; the weight is [out, in], as on disk."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class GroupedLinear(nn.Module):
    """One matrix an expert: y = x W_e^T for rows that are sorted by expert. weight [experts, out, in]."""

    def __init__(self, experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [M, in], counts [experts] -> [M, out]."""
        return grouped_linear(x, self.weight, counts)

    def expert(self, number: int) -> Linear:
        """The linear layer of one expert; its weight is a view of the stack, so that what is written there counts."""
        with torch.device("meta"):
            view = Linear(self.in_features, self.out_features, bias=False)
        view.weight = nn.Parameter(self.weight.detach()[number], requires_grad=self.weight.requires_grad)
        return view

    def each(self) -> Iterator[Linear]:
        """`expert` for every expert."""
        return map(self.expert, range(self.experts))

    def extra_repr(self) -> str:
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"


def by_expert(x: Tensor, counts: Tensor, out: int, product: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Every expert's rows of x [M, in], which are sorted by expert, times its matrix -> [M, out]; experts without rows
    are passed over."""
    if x.is_meta:
        return x.new_empty(x.shape[0], out)
    parts = enumerate(x.split(counts.tolist()))
    made = [product(rows, e) for e, rows in parts if rows.shape[0]]
    return torch.cat(made) if made else x.new_empty(0, out)


def unhooked(*modules: nn.Module | None) -> bool:
    """Whether nobody has a hook on any of these (None aside), or on all modules that there are, or a `forward` of its
    own in its place, so that what it does need not be done by calling it."""
    if every._global_forward_hooks or every._global_forward_pre_hooks:
        return False
    for m in modules:
        if m is not None and (m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__):
            return False
    return True


def bare(*modules: nn.Module | None) -> bool:
    """Whether each (None aside) is a `Linear` or `GroupedLinear` as it is made here, on which nobody has a hook: then
    its weight and bias say all of what it does, and a kernel may do it together with its neighbours."""
    return all(m is None or type(m) is GroupedLinear or type(m) is Linear for m in modules) and unhooked(*modules)


# What picks experts, whose choice rounding would change, and what decoding absorbs into other matrices.
KEPT = ("router.linear", "query", "kv_up")


class LinearConfig(Config, ABC, abstract=True):
    """What stands for a `Linear` of a layer, such as a quantised one."""

    skip: tuple[str, ...] = KEPT  # ends of the dotted names of those that stay as they are

    @abstractmethod
    def build(self, linear: Linear) -> nn.Module:
        """What takes the place of `linear`, of the same width, bias and dtype; its weights are not taken over."""

    def build_experts(self, experts: GroupedLinear) -> nn.Module:
        """What takes the place of a stack of matrices; unless a class knows better, the stack itself."""
        return experts


def replace_linears(module: nn.Module, config: LinearConfig) -> None:
    """Put what `config` builds in the place of every `Linear` and every `GroupedLinear` below a module, but for those
    that it skips."""
    for name, child in list(module.named_modules()):
        if any(f".{name}".endswith(f".{end}") for end in config.skip):
            continue
        if type(child) is Linear:
            module.set_submodule(name, config.build(child))
        elif type(child) is GroupedLinear:
            module.set_submodule(name, config.build_experts(child))


@runtime_checkable
class Packed(Protocol):
    def packed_parameters(self) -> int:
        """How many weights it holds in a buffer, several to a byte."""


def count(module: nn.Module) -> int:
    """Parameters, each once, and weights that are packed."""
    packed = sum(m.packed_parameters() for m in module.modules() if isinstance(m, Packed))
    return packed + sum(p.numel() for p in module.parameters())

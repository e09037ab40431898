"""LoRA (Hu et al. 2021) beside a linear map that stays as it is: y = x W^T + scale (x A^T) B^T, A [r, in], B [out, r];
of one adapter, or of several in one batch, each for its own tokens (Punica, Chen et al. 2023; S-LoRA, Sheng et al.)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import nearest
from ..ops.linear import linear
from .bitlinear import PackedBitLinear
from .codes import CodedLinear
from .linear import GroupedLinear, Linear


class Adapters:
    """Which adapter each token of the next pass goes through: one object that all adapted maps of a model share.

    `names` are the adapters', in the order of their numbers; None, and the number -1, is the model without any. Only
    one thread may run the model while a choice stands.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.groups: tuple[tuple[str, slice | None], ...] = ()  # number, and its tokens (None: all of them)
        self.tokens = 0  # in all, where some go through one adapter and some through another

    def number(self, name: str | None) -> int:
        """Raises ValueError for a name that is not there."""
        if name is None:
            return -1
        if name not in self.names:
            known = f"; there are {', '.join(self.names)}" if self.names else "; the model has none"
            raise ValueError(f"there is no adapter {name!r}{nearest(name, self.names)}{known}")
        return self.names.index(name)

    def choose(self, name: str | None) -> None:
        """From now on, all tokens."""
        number = self.number(name)
        self.groups = () if number < 0 else ((str(number), None),)

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """All tokens, within this block."""
        before = self.groups
        self.choose(name)
        try:
            yield
        finally:
            self.groups = before

    @contextmanager
    def rows(self, runs: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Within this block, tokens [B, T], read in order, go through these: (number of an adapter, how many tokens).
        It costs least where those of one adapter stand together."""
        before, groups, end, last = self.groups, [], 0, None
        for number, count in runs:
            start, end = end, end + count
            if number == last and number >= 0:
                groups[-1] = (str(number), slice(groups[-1][1].start, end))
            elif number >= 0:
                groups.append((str(number), slice(start, end)))
            last = number
        whole = len(groups) == 1 and groups[0][1] == slice(0, end)
        self.groups = ((groups[0][0], None),) if whole else tuple(groups)
        self.tokens = end
        try:
            yield
        finally:
            self.groups = before


class Factors(nn.Module):
    """scale (x A^T) B^T of one adapter; A [r, in], B [out, r], in whose dtype it is computed."""

    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(B), scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], without the scale, in x's dtype."""
        return linear(linear(x.to(self.A.dtype), self.A), self.B).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}, scale={self.scale:g}"


class LoRA(nn.Module):
    """The map `base`, and the `factors` of those adapters that change it, by number."""

    def __init__(self, base: nn.Module, adapters: Adapters) -> None:
        super().__init__()
        self.base, self.adapters, self.factors = base, adapters, nn.ModuleDict()

    @property
    def bias(self) -> Any:
        """The base's, which is no adapter's. There is no `weight`: it would be another for each token."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y: Tensor = self.base(x)
        for number, rows in self.adapters.groups:
            if number in self.factors:
                factors: Any = self.factors[number]
                y = self._all(factors, x, y) if rows is None else self._some(factors, x, y, rows)
        return y

    def _all(self, factors: Factors, x: Tensor, y: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return torch.add(y, factors(x), alpha=factors.scale)
        return y.add_(factors(x), alpha=factors.scale)

    def _some(self, factors: Factors, x: Tensor, y: Tensor, rows: slice) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] != self.adapters.tokens:
            raise ValueError(
                f"a layer reads {flat.shape[0]} rows where there are {self.adapters.tokens} tokens, so they cannot "
                "go through several adapters at once; use one at a time, or merge it into the weights"
            )
        if torch.is_grad_enabled():
            y = y.clone()
        y.view(-1, y.shape[-1])[rows].add_(factors(flat[rows]), alpha=factors.scale)
        return y


def linear_maps(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    """Name, module and shape of every linear map: [out, in], or [experts, out, in] for a stack. Of an adapted map, the
    name that it had before, and its base."""
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoRA)}
    for name, module in model.named_modules():
        owner = name.removesuffix(".base")
        name = owner if owner in adapted else name
        if isinstance(module, GroupedLinear):
            yield name, module, (module.experts, module.out_features, module.in_features)
        elif isinstance(module, Linear | PackedBitLinear):
            yield name, module, (module.out_features, module.in_features)
        elif isinstance(module, CodedLinear):
            yield name, module, (module.rows, module.width)

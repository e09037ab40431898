"""LoRA (Hu et al. 2021) beside a linear map that stays as it is: y = x W^T + scale (x A^T) B^T, A [r, in], B [out, r];
of one adapter, or of several in one batch, each for its own tokens (Punica, Chen et al. 2023; S-LoRA, Sheng et al.)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import nearest
from ..ops.low_rank import add_low_rank
from .bitlinear import PackedBitLinear
from .codes import CodedExperts, CodedLinear
from .linear import GroupedLinear, Linear

Groups = tuple[tuple[str, slice | None], ...]  # numbers of adapters, and the tokens of each (None: all of them)


class Adapters:
    """The adapters of a model, and which of them each token of the next pass goes through.

    `names` are in the order of their numbers; None, and the number -1, is the model without any. While no token goes
    through one, the maps themselves stand in the model, which then is what it was and costs what it did; else their
    `LoRA`s do. Only one thread may run the model while a choice stands.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.places: dict[str, tuple[nn.Module, str, LoRA]] = {}  # by dotted name: parent, its name for it
        self.groups: Groups = ()
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
        self._go(() if number < 0 else ((str(number), None),))

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """All tokens, within this block."""
        before = self.groups
        self.choose(name)
        try:
            yield
        finally:
            self._go(before)

    @contextmanager
    def rows(self, runs: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Within this block, tokens [B, T], read in order, go through these: (number of an adapter, how many tokens).
        It costs least where those of one adapter stand together."""
        before, found, end = self.groups, list[tuple[int, int, int]](), 0
        for number, count in runs:
            start, end = end, end + count
            if found and number == found[-1][0]:
                start = found.pop()[1]
            found.append((number, start, end))
        self.tokens = end
        if len(found) == 1:
            self._go(((str(found[0][0]), None),) if found[0][0] >= 0 else ())
        else:
            self._go(tuple((str(number), slice(start, stop)) for number, start, stop in found if number >= 0))
        try:
            yield
        finally:
            self._go(before)

    def _go(self, groups: Groups) -> None:
        if bool(groups) != bool(self.groups):
            for parent, name, lora in self.places.values():
                parent._modules[name] = lora if groups else lora.base
        self.groups = groups


class Factors(nn.Module):
    """scale (x A^T) B^T of one adapter; A [r, in], B [out, r], whose columns lie together."""

    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(B.mT.contiguous().mT), scale

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y + scale (x A^T) B^T; y [..., out], which may be overwritten where no gradient is wanted, x [..., in]."""
        return add_low_rank(y, x, self.A, self.B, self.scale)

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
                factors = self.factors[number]
                y = factors(y, x) if rows is None else self._some(factors, x, y, rows)
        return y

    def _some(self, factors: nn.Module, x: Tensor, y: Tensor, rows: slice) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] != self.adapters.tokens:
            raise ValueError(
                f"a layer reads {flat.shape[0]} rows where there are {self.adapters.tokens} tokens, so they cannot "
                "go through several adapters at once; use one at a time, or merge it into the weights"
            )
        out = y.view(-1, y.shape[-1])
        if torch.is_grad_enabled():
            return torch.cat([out[: rows.start], factors(out[rows], flat[rows]), out[rows.stop :]]).view_as(y)
        factors(out[rows], flat[rows])
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
        elif isinstance(module, CodedExperts):
            yield name, module, (module.experts, module.rows, module.width)
        elif isinstance(module, CodedLinear):
            yield name, module, (module.rows, module.width)

"""Rules between the tensors of a published checkpoint and ours: declarative, one pass, strict, and invertible.

Names may hold `{i}`, `{j}` (integers, equal on both sides) and, in `Stack`, `{e}`, the axis that is stacked. A `Rename`
whose names end with a dot moves everything below. The first rule that matches a name takes it; a name that none takes
is an error, in both directions, and what `unload` gives back is what `load` was given, to the bit.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    body = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(pattern))
    return re.compile(body + ("(?P<rest>.*)" if pattern.endswith(".") else ""))


class Rule(ABC):
    """One or more names of theirs for one or more of ours."""

    theirs: Sequence[str]
    ours: Sequence[str]

    @abstractmethod
    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """Theirs to ours, in the order of the names. Views where that is possible."""

    @abstractmethod
    def inverse(self, tensors: list[Tensor]) -> list[Tensor]:
        """Ours to theirs."""


class OneToOne(Rule, ABC):
    def __init__(self, theirs: str, ours: str) -> None:
        self.theirs, self.ours = (theirs,), (ours,)


class Rename(OneToOne):
    """The same tensor under another name."""

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    inverse = forward


class Transpose(OneToOne):
    """A matrix stored [in, out], as GPT-2's Conv1D; vectors pass as they are."""

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t.mT if t.dim() > 1 else t for t in tensors]

    inverse = forward


class Flatten(OneToOne):
    """A tensor stored [rows, n] that is one long vector here."""

    def __init__(self, theirs: str, ours: str, rows: int) -> None:
        super().__init__(theirs, ours)
        self.rows = rows

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t.flatten(0, 1) for t in tensors]

    def inverse(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t.unflatten(0, (self.rows, -1)) for t in tensors]


class Split(Rule):
    """One fused tensor for several of ours, cut along its outputs (axis 0; axis 1 if `transposed`, as in Conv1D).

    With `heads`, the fused axis is [heads, sum(sizes) / heads]: every head has its own share of each part (GPT-NeoX).
    """

    def __init__(
        self, theirs: str, ours: Sequence[str], sizes: Sequence[int], *, heads: int = 1, transposed: bool = False
    ) -> None:
        self.theirs, self.ours = (theirs,), tuple(ours)
        self.sizes, self.heads, self.transposed = tuple(sizes), heads, transposed

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        fused = tensors[0].mT if self.transposed and tensors[0].dim() > 1 else tensors[0]
        if self.heads == 1:
            return list(fused.split(self.sizes))
        parts = fused.unflatten(0, (self.heads, -1)).split([size // self.heads for size in self.sizes], 1)
        return [part.flatten(0, 1) for part in parts]

    def inverse(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.heads == 1:
            fused = torch.cat(tensors)
        else:
            fused = torch.cat([t.unflatten(0, (self.heads, -1)) for t in tensors], 1).flatten(0, 1)
        return [fused.mT if self.transposed and fused.dim() > 1 else fused]


class SplitStack(Rule):
    """Matrices of many experts, fused and stored [experts, in, sum of outs], for several of ours [experts, out, in]."""

    def __init__(self, theirs: str, ours: Sequence[str], sizes: Sequence[int]) -> None:
        self.theirs, self.ours, self.sizes = (theirs,), tuple(ours), tuple(sizes)

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return [part.mT for part in tensors[0].split(self.sizes, -1)]

    def inverse(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat([t.mT for t in tensors], -1)]


class Stack(OneToOne):
    """One tensor for each {e} of theirs, `count` of them if it is given, one tensor with a leading axis of ours."""

    def __init__(self, theirs: str, ours: str, count: int | None = None) -> None:
        super().__init__(theirs, ours)
        self.count = count

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.stack(tensors)]

    def inverse(self, tensors: list[Tensor]) -> list[Tensor]:
        return list(tensors[0])


class Drop(Rule):
    """Tensors that hold no weights (position tables, masks) or repeat another: read past, never written.

    With `same_as`, the tensor must equal that one of theirs - a tied head that was written out all the same.
    """

    def __init__(self, theirs: str, same_as: str | None = None) -> None:
        self.theirs, self.ours, self.same_as = (theirs,), (), same_as

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        return []

    inverse = forward


class Copy(Drop):
    """A tensor of theirs that repeats another: it need not be there, and is written out wherever `beside` is."""

    def __init__(self, theirs: str, same_as: str, beside: str) -> None:
        super().__init__(theirs, same_as)
        self.beside = beside


@dataclass
class _Match:
    rule: Rule
    index: dict[str, str]
    found: dict[tuple[int, str, int], str] = field(default_factory=dict)  # (position, rest, e) -> name


def _gather(rules: Sequence[Rule], names: Sequence[str], side: str) -> list[_Match]:
    """Which rule takes which names; names of one rule with equal indices belong together."""
    matches: dict[tuple[int, tuple[tuple[str, str], ...], str], _Match] = {}
    for name in names:
        for number, rule in enumerate(rules):
            hit = next(((p, m) for p, x in enumerate(getattr(rule, side)) if (m := _regex(x).fullmatch(name))), None)
            if hit is None:
                continue
            position, m = hit
            index = m.groupdict()
            rest, e = index.pop("rest", None) or "", int(index.pop("e", None) or 0)
            key = number, tuple(sorted(index.items())), rest
            matches.setdefault(key, _Match(rule, index)).found[position, rest, e] = name
            break
        else:
            raise ValueError(f"no rule knows the tensor {name!r}")
    return list(matches.values())


def _names(patterns: Sequence[str], match: _Match, count: int) -> list[str]:
    rest = next(iter(match.found))[1]
    if len(patterns) == 1 and "{e}" in patterns[0]:
        return [patterns[0].format(**match.index, e=e) for e in range(count)]
    return [pattern.format(**match.index) + rest for pattern in patterns]


def _apply(rules: Sequence[Rule], weights: Mapping[str, Tensor], side: str) -> Weights:
    out: Weights = {}
    for match in _gather(rules, list(weights), side):
        rule = match.rule
        here: Sequence[str] = getattr(rule, side)
        tensors = [weights[match.found[key]] for key in sorted(match.found)]
        stacked = "{e}" in here[0]
        numbers = sorted(e for _, _, e in match.found)
        wanted = range(rule.count if isinstance(rule, Stack) and rule.count else numbers[-1] + 1)
        if stacked and (gaps := sorted(set(wanted) - set(numbers))):
            gap = gaps[0]
            raise ValueError(f"the tensor {here[0].format(**match.index, e=gap)!r} is missing")
        if not stacked and len(tensors) != len(here):
            missing = next(p for p, _ in enumerate(here) if all(p != q for q, _, _ in match.found))
            raise ValueError(f"the tensor {here[missing].format(**match.index)!r} is missing")
        twin = weights.get(rule.same_as) if isinstance(rule, Drop) and rule.same_as else None
        if twin is not None and not torch.equal(tensors[0], twin):
            raise ValueError(f"{here[0]!r} is no copy of the embedding, but config.json says that they are tied")
        if side == "theirs":
            made = rule.forward(tensors)
            names = _names(rule.ours, match, len(made))
        else:
            made = rule.inverse(tensors)
            names = _names(rule.theirs, match, len(made))
        for name, tensor in zip(names, made, strict=True):
            if name in out:
                raise ValueError(f"two tensors want to be {name!r}")
            out[name] = tensor
    return out


def load(rules: Sequence[Rule], theirs: Mapping[str, Tensor]) -> Weights:
    """A checkpoint's tensors under our names. Raises ValueError for a tensor that no rule knows, or half a group."""
    return _apply(rules, theirs, "theirs")


def unload(rules: Sequence[Rule], ours: Mapping[str, Tensor]) -> Weights:
    """The inverse of `load`."""
    theirs = _apply([rule for rule in rules if rule.ours], ours, "ours")
    for rule in rules:
        if isinstance(rule, Copy) and rule.same_as is not None and rule.beside in theirs:
            theirs[rule.theirs[0]] = theirs[rule.same_as].clone()
    return theirs

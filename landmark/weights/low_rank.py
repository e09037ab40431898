"""Matrices of low rank that pass through the rules of a checkpoint as the tensors they stand for.

A rule only moves, cuts and joins the outputs of matrices. What it does to a product `left @ right` it does to `left`;
where it joins matrices whose inputs differ, the product of the joined is block structured. So the rules that load a
family's weights also say where its adapters go, and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRank:
    """scale * left @ right. left [..., out, r], right [..., r, in]; right may lack leading axes that left has.

    It knows what `Rule`s do to tensors: `mT`, `split`, `flatten`, `unflatten`, iteration, `torch.cat`, `torch.stack`.
    `turned`: it is [in, out] at present. `expert`: it is one of a stack.
    """

    def __init__(
        self, left: Tensor, right: Tensor, scale: float = 1.0, *, turned: bool = False, expert: bool = False
    ) -> None:
        self.left, self.right, self.scale, self.turned, self.expert = left, right, scale, turned, expert

    @classmethod
    def nothing(cls, *shape: int) -> LowRank:
        """Rank 0: the zeros [..., out, in]."""
        return cls(torch.empty(*shape[:-1], 0), torch.empty(*shape[:-2], 0, shape[-1]))

    @property
    def rank(self) -> int:
        return self.left.shape[-1]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.left.shape[:-1], self.right.shape[-1]))

    @property
    def mT(self) -> LowRank:
        return LowRank(self.right.mT, self.left.mT, self.scale, turned=not self.turned, expert=self.expert)

    def dim(self) -> int:
        return self.left.dim()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., out, in]."""
        return self.scale * (self.left.to(dtype) @ self.right.to(dtype))

    def split(self, sizes: Sequence[int], dim: int = 0) -> list[LowRank]:
        if dim == -1:
            return [part.mT for part in self.mT.split(sizes, self.dim() - 2)]
        assert dim == self.dim() - 2, "rules cut matrices along their outputs"
        return [self._with(left) for left in self.left.split(list(sizes), dim)]

    def unflatten(self, dim: int, sizes: Sequence[int]) -> LowRank:
        return self._with(self.left.unflatten(dim, tuple(sizes)))

    def flatten(self, start: int, end: int) -> LowRank:
        return self._with(self.left.flatten(start, end))

    def __iter__(self) -> Iterator[LowRank]:
        for left, right in zip(self.left, self.right, strict=True):
            yield LowRank(left, right, self.scale, turned=self.turned, expert=True)

    def _with(self, left: Tensor) -> LowRank:
        return LowRank(left, self.right, self.scale, turned=self.turned, expert=self.expert)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> LowRank:
        if func is torch.stack:
            return _stack(*args)
        if func is torch.cat:
            return _cat(*args)
        raise TypeError(f"rules may not use {func.__name__} on a matrix of low rank")


def _cat(parts: Sequence[LowRank], dim: int = 0) -> LowRank:
    """Outputs one after another. Parts with one right factor share it; others get blocks of their own."""
    first = parts[0]
    if dim == -1:
        return _cat([part.mT for part in parts], first.dim() - 2).mT
    assert dim == first.dim() - 2, "rules join matrices along their outputs"
    if all(part.scale == first.scale and torch.equal(part.right, first.right) for part in parts):
        return first._with(torch.cat([part.left for part in parts], dim))
    lefts, before, total = [], 0, sum(part.rank for part in parts)
    parts = _of_one_scale(parts)
    for part in parts:
        lefts.append(F.pad(part.left, (before, total - before - part.rank)))
        before += part.rank
    return LowRank(
        torch.cat(lefts, dim), torch.cat([part.right for part in parts], -2), parts[0].scale, turned=first.turned
    )


def _stack(parts: Sequence[LowRank]) -> LowRank:
    """One above the other, all of the highest rank."""
    turned, rank = parts[0].turned, max(part.rank for part in parts)
    parts = _of_one_scale(parts)
    left = torch.stack([F.pad(part.left, (0, rank - part.rank)) for part in parts])
    right = torch.stack([F.pad(part.right, (0, 0, 0, rank - part.rank)) for part in parts])
    return LowRank(left, right, parts[0].scale, turned=turned)


def _of_one_scale(parts: Sequence[LowRank]) -> list[LowRank]:
    like = next((part for part in parts if part.rank), parts[0])
    return [
        LowRank(
            (part.left if part.scale == like.scale else part.left * (part.scale / like.scale)).to(like.left.dtype),
            part.right.to(like.right.dtype),
            like.scale,
        )
        for part in parts
    ]

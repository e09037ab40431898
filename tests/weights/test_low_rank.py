"""A matrix of low rank goes through every rule as the tensor that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from landmark.weights.low_rank import LowRank
from landmark.weights.rules import Rename, Rule, Split, SplitStack, Stack, Transpose, load, unload

RULES: dict[str, tuple[Rule, dict[str, tuple[int, ...]]]] = {  # and the shapes of ours
    "rename": (Rename("t.", "o."), {"o.weight": (6, 5)}),
    "transpose": (Transpose("t.", "o."), {"o.weight": (6, 6)}),
    "split": (Split("t.", ["q.", "k."], [6, 4]), {"q.weight": (6, 5), "k.weight": (4, 5)}),
    "split, [in, out]": (Split("t.", ["q.", "k."], [6, 4], transposed=True), {"q.weight": (6, 5), "k.weight": (4, 5)}),
    "split by heads": (Split("t.", ["q.", "k."], [6, 4], heads=2), {"q.weight": (6, 5), "k.weight": (4, 5)}),
    "stack": (Stack("t.{e}.weight", "o.weight", 3), {"o.weight": (3, 6, 5)}),
    "split stack": (
        SplitStack("t.weight", ["g.weight", "u.weight"], [4, 4]), {"g.weight": (3, 4, 5), "u.weight": (3, 4, 5)},
    ),
    "transposed stack": (Transpose("t.weight", "o.weight"), {"o.weight": (3, 6, 5)}),
}  # fmt: skip


def low(*shape: int, rank: int = 2, scale: float = 0.5) -> LowRank:
    return LowRank(torch.randn(*shape[:-1], rank), torch.randn(*shape[:-2], rank, shape[-1]), scale)


def dense(weights: Any) -> dict[str, Tensor]:
    return {name: matrix.dense() for name, matrix in weights.items()}


def check(found: Any, wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name])
        assert found[name].shape == wanted[name].shape


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("shared", [True, False], ids=["one A", "an A each"])
def test_rules(kind: str, shared: bool) -> None:
    """Both ways; from factors of their own, ranks and scales of their own too, and from those that share their A."""
    rule, shapes = RULES[kind]
    ours: Any = {name: low(*shape, rank=2 + n, scale=1 + n) for n, (name, shape) in enumerate(shapes.items())}
    if shared:
        first = next(iter(ours.values()))
        ours = {name: LowRank(torch.randn(*shape[:-1], 2), first.right, 3.0) for name, shape in shapes.items()}
    theirs: Any = unload([rule], ours)
    check(dense(theirs), unload([rule], dense(ours)))
    check(dense(load([rule], theirs)), dense(ours))
    assert all(matrix.turned == (kind in ("transpose", "split, [in, out]", "split stack", "transposed stack"))
               for matrix in theirs.values())  # fmt: skip
    if shared:
        assert all(matrix.rank == 2 for matrix in theirs.values() if not matrix.turned)


def test_nothing_adds_nothing() -> None:
    """What an adapter leaves out has rank 0, keeps its shape, and does not change what it is joined with."""
    rule = RULES["split"][0]
    q, k = low(6, 5), LowRank.nothing(4, 5)
    fused: Any = unload([rule], {"q.weight": q, "k.weight": k})["t.weight"]  # type: ignore[dict-item]
    assert fused.rank == 2 and fused.shape == (10, 5) and not fused.dense()[6:].any()
    torch.testing.assert_close(fused.dense()[:6], q.dense())
    stacked = torch.stack([low(6, 5, rank=1), LowRank.nothing(6, 5), low(6, 5, rank=3)])  # type: ignore[list-item]
    assert stacked.shape == (3, 6, 5) and stacked.rank == 3 and not stacked.dense()[1].any()  # type: ignore[attr-defined]


def test_what_rules_may_not_do() -> None:
    with pytest.raises(TypeError, match="rules may not use exp"):
        torch.exp(low(3, 3))  # type: ignore[arg-type]

from __future__ import annotations

import pytest
import torch

from landmark.weights.rules import Drop, Flatten, Rename, Rule, Split, Stack, Transpose, load, unload

RULES: list[Rule] = [
    Drop("head.weight", same_as="wte.weight"),
    Rename("wte.", "embed."),
    Drop("h.{i}.attn.bias"),
    Split("h.{i}.qkv.weight", ["l.{i}.q", "l.{i}.k", "l.{i}.v"], (4, 2, 2), transposed=True),
    Split("h.{i}.fused.weight", ["l.{i}.a", "l.{i}.b"], (6, 3), heads=3),
    Transpose("h.{i}.fc.weight", "l.{i}.fc"),
    Flatten("h.{i}.norm", "l.{i}.norm", rows=2),
    Stack("h.{i}.expert.{e}.w", "l.{i}.experts"),
]


def checkpoint() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    out = {"wte.weight": torch.randn(5, 3, generator=g)}
    for i in range(2):
        out[f"h.{i}.qkv.weight"] = torch.randn(3, 8, generator=g)
        out[f"h.{i}.fused.weight"] = torch.randn(9, 2, generator=g)
        out[f"h.{i}.fc.weight"] = torch.randn(3, 7, generator=g)
        out[f"h.{i}.norm"] = torch.randn(2, 4, generator=g)
        out |= {f"h.{i}.expert.{e}.w": torch.randn(2, 2, generator=g) for e in range(11)}
    return out


def test_inverse_to_the_bit() -> None:
    theirs = checkpoint()
    ours = load(RULES, theirs)
    back = unload(RULES, ours)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert ours["l.1.q"].shape == (4, 3)
    assert torch.equal(ours["l.0.experts"][10], theirs["h.0.expert.10.w"])
    fused = theirs["h.0.fused.weight"].view(3, 3, 2)  # every head has its share of a and b
    assert torch.equal(ours["l.0.a"], fused[:, :2].reshape(6, 2))


def test_views_where_possible() -> None:
    theirs = checkpoint()
    ours = load(RULES, theirs)
    for name, source in (("l.0.k", "h.0.qkv.weight"), ("l.0.fc", "h.0.fc.weight"), ("embed.weight", "wte.weight")):
        assert ours[name].untyped_storage().data_ptr() == theirs[source].untyped_storage().data_ptr()


def test_a_written_out_tied_head_must_be_equal() -> None:
    theirs = checkpoint()
    assert "head.weight" not in load(RULES, {**theirs, "head.weight": theirs["wte.weight"].clone()})
    with pytest.raises(ValueError, match="tied"):
        load(RULES, {**theirs, "head.weight": theirs["wte.weight"] + 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"h.0.surprise": torch.zeros(1)}, "no rule knows the tensor 'h.0.surprise'"),
        (lambda w: {k: v for k, v in w.items() if k != "h.1.expert.3.w"}, "'h.1.expert.3.w' is missing"),
    ],
)
def test_strict(change, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        load(RULES, change(checkpoint()))


def test_half_a_group_cannot_be_written() -> None:
    ours = load(RULES, checkpoint())
    del ours["l.1.k"]
    with pytest.raises(ValueError, match=r"'l\.1\.k' is missing"):
        unload(RULES, ours)

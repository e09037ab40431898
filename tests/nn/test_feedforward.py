"""Feed-forward functions overwrite what is their own, and nothing that somebody has seen."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from landmark.nn import feedforward
from landmark.nn.feedforward import GLU, MLP
from landmark.nn.together import PIECE, together

TOKENS = 40  # more than the kernels for a few tokens take


def build(kind: str) -> tuple[GLU | MLP, nn.Module]:
    """One, and what is overwritten in it."""
    torch.manual_seed(0)
    if kind == "gated":
        gated = GLU.Config(hidden=48).build(32)
        return gated, gated.gate
    plain = MLP.Config(hidden=48).build(32)
    return plain, plain.up


@pytest.mark.parametrize("kind", ["gated", "plain"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_what_a_hook_caught_stays(kind: str, everywhere: bool) -> None:
    module, inner = build(kind)
    x, caught = torch.randn(TOKENS, 32), list[Tensor]()

    def catch(m: nn.Module, _: object, out: Tensor) -> None:
        if m is inner:
            caught.append(out)

    with torch.inference_mode():
        want, free = inner(x), module(x)
        hook = register_module_forward_hook(catch) if everywhere else inner.register_forward_hook(catch)
        with hook:
            y = module(x)
    torch.testing.assert_close(y, free, rtol=0, atol=0)
    for out in caught:
        torch.testing.assert_close(out, want, rtol=0, atol=0)
    assert caught


@pytest.mark.parametrize("kind", ["gated", "plain"])
@pytest.mark.parametrize("shape", [(TOKENS,), (3, PIECE), (PIECE + 1,)])
def test_without_gradient_it_comes_to_the_same(kind: str, shape: tuple[int, ...]) -> None:
    module, _ = build(kind)
    module = module.double()
    x = torch.randn(*shape, 32, dtype=torch.float64)
    with torch.inference_mode():
        y = module(x)
    torch.testing.assert_close(y, module(x).detach(), rtol=1e-13, atol=1e-14)


def test_a_long_text_goes_through_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than PIECE rows of inner vectors are there at once, unless somebody looks on or a gradient is wanted."""
    module, inner = build("gated")
    seen = list[int]()

    def recorded(x: Tensor, *maps: nn.Module) -> Sequence[Tensor]:
        seen.append(len(x))
        return together(x, *maps)

    monkeypatch.setattr(feedforward, "together", recorded)
    x = torch.randn(2 * PIECE + 3, 32)
    with torch.inference_mode():
        module(x)
        assert seen == [PIECE, PIECE, 3]
        with inner.register_forward_hook(lambda *_: None):
            module(x)
    module(x)
    assert seen[3:] == [len(x)] * 2


@pytest.mark.parametrize("kind", ["gated", "plain"])
@pytest.mark.parametrize("tokens", [2, TOKENS])
def test_a_forward_of_its_own_is_called_and_keeps_what_it_saw(kind: str, tokens: int) -> None:
    module, inner = build(kind)
    x, kept, whole = torch.randn(tokens, 32), list[Tensor](), inner.forward

    def doubled(x: Tensor) -> Tensor:
        kept.append(2 * whole(x))
        return kept[-1]

    with torch.no_grad():
        want, free = 2 * inner(x), module(x)
        inner.forward = doubled  # type: ignore[method-assign]
        assert not torch.allclose(module(x), free)
    assert len(kept) == 1 and torch.equal(kept[0], want)

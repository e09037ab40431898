"""What torch.func and forward-mode derivatives make of a model: kernels stand aside, and no tangent is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import landmark
from landmark.models.decoder import Decoder
from landmark.nn.codes import CodedLinear
from landmark.nn.feedforward import GLU
from landmark.nn.linear import Linear
from landmark.ops.loss import cross_entropy

from ..infer.models import LLAMA, build, every_family


def logits(model: Decoder, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    out = functional_call(model, weights, (tokens,))
    return out if isinstance(out, Tensor) else out.logits


def decoders() -> list[str]:
    with torch.device("meta"):
        return [name for name, hf in every_family().items() if isinstance(landmark.build(hf), Decoder)]


@pytest.mark.parametrize("architecture", decoders())
def test_a_derivative_forward_is_that_of_backward(architecture: str) -> None:
    model = build(every_family()[architecture])
    torch.manual_seed(0)
    tokens, weights = torch.randint(3, 50, (2, 7)), dict(model.named_parameters())
    tangents = {name: torch.randn_like(w) * 0.05 * w.abs().mean() for name, w in weights.items()}
    y = logits(model, weights, tokens)
    g = torch.randn_like(y)
    back = torch.autograd.grad(y, list(weights.values()), g, allow_unused=True)
    pairs = zip(back, tangents.values(), strict=True)
    expected = torch.stack([(b.double() * t.double()).sum() for b, t in pairs if b is not None]).sum()
    frozen = {name: w.detach() for name, w in weights.items()}
    again, tangent = jvp(lambda w: logits(model, w, tokens), (frozen,), (tangents,))
    torch.testing.assert_close(again, y.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((tangent.double() * g.double()).sum(), expected, rtol=2e-3, atol=1e-4)


def test_a_gradient_for_each_text() -> None:
    model = build(LLAMA)
    weights, texts = {n: w.detach() for n, w in model.named_parameters()}, torch.randint(3, 90, (4, 9))

    def loss(weights: dict[str, Tensor], text: Tensor) -> Tensor:
        hidden = logits(model, weights, text[None])[0, :-1]
        eye = torch.eye(hidden.shape[1])
        return cross_entropy(hidden, eye, text[1:]).loss

    each = vmap(grad(loss), (None, 0))(weights, texts)
    for i, text in enumerate(texts):
        alone = dict(model.named_parameters())
        expected = torch.autograd.grad(loss(alone, text), list(alone.values()))
        for name, g in zip(alone, expected, strict=True):
            torch.testing.assert_close(each[name][i], g, rtol=1e-4, atol=1e-5)


def frozen_glu(coded: int | None) -> Any:
    torch.manual_seed(0)
    glu = GLU.Config(hidden=96).build(64)
    for p in glu.parameters():
        torch.nn.init.normal_(p, std=0.1)
    if coded is not None:
        for name in ("gate", "up", "down"):
            linear = glu.get_submodule(name)
            assert isinstance(linear, Linear)
            codes = CodedLinear.Config(bits=coded).build(linear)
            codes.fill(linear.weight)
            glu.set_submodule(name, codes)
    return glu.requires_grad_(False)


@pytest.mark.parametrize("coded", [None, 4, 8])
def test_what_is_frozen_keeps_tangents(coded: int | None) -> None:
    """Nothing learns there: kernels would run, and one that overwrites its input would leave the old tangent."""
    glu = frozen_glu(coded)
    x, along = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    expected = (glu(x + 1e-2 * along) - glu(x - 1e-2 * along)) / 2e-2
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(glu(forward_ad.make_dual(x, along))).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, expected, rtol=1e-2, atol=2e-3)

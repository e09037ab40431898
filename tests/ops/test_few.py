"""Feed-forward functions and routers of a few tokens in one call each, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from landmark.nn.feedforward import GLU, perceptron
from landmark.nn.linear import Linear
from landmark.nn.moe import MoE
from landmark.nn.router import SigmoidInput, SigmoidTopK, SoftmaxTopK
from landmark.ops import feedforward as few
from landmark.ops.activation import ACTIVATIONS
from landmark.ops.moe import choose

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.5e-2}  # of the largest element: a few roundings
needs_kernel = pytest.mark.skipif(few.SOURCE.why_not() is not None, reason=str(few.SOURCE.why_not()))


def weights(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5


@needs_kernel
@pytest.mark.parametrize("act", ACTIVATIONS)
@torch.no_grad()
def test_activations(act: str) -> None:
    module = GLU(GLU.Config(hidden=50, act=act), 24)  # type: ignore[arg-type]
    x = 2 * torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    module.double()
    want = module(x.double())
    got = module.float()(x)
    assert (got - want).abs().max() <= 4e-6 * want.abs().max()


@needs_kernel
@torch.no_grad()
def test_who_looks_on_sees_every_call() -> None:
    """A hook, a bias or another module in the place of a matrix keeps the parts apart."""
    module, x, seen = GLU(GLU.Config(hidden=8), 4), torch.randn(1, 1, 4), []
    want = module(x)
    handle = module.up.register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(module(x), want, atol=1e-6) and seen == [1]
    handle.remove()
    module.up = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ValueError):
        module(x)
    assert GLU(GLU.Config(hidden=8, bias=True), 4)(x).shape == x.shape


@needs_kernel
def test_gradients_take_the_other_way() -> None:
    module = GLU(GLU.Config(hidden=8), 4)
    assert module(torch.randn(1, 1, 4)).requires_grad
    assert few.why_not(torch.randn(17, 4), None, torch.zeros(8, 4), torch.zeros(4, 8)) is not None


ROUTERS = {
    "mixtral": SoftmaxTopK.Config(),
    "softmax": SoftmaxTopK.Config(renormalise=False, scale=2.0),
    "deepseek-v2": SoftmaxTopK.Config(renormalise=False, scale=16.0, groups=4, active_groups=2),
    "deepseek-v3": SigmoidTopK.Config(scale=2.5, groups=4, active_groups=2),
    "sigmoid": SigmoidTopK.Config(renormalise=False),
    "llama 4": SigmoidInput.Config(),
}


@needs_kernel
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.no_grad()
def test_routers(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel chooses and weighs as the router does in plain torch."""
    dim, experts, active = 70, 16, 3
    router = ROUTERS[name].build(dim, experts, active)
    router.linear.weight.copy_(weights(experts, dim, seed=0))
    if isinstance(router, SigmoidTopK):
        router.bias.copy_(weights(experts, seed=1))
    router.to(dtype).eval()
    for tokens in (1, 5, 16):
        x = (2 * torch.randn(tokens, dim, generator=torch.Generator().manual_seed(tokens))).to(dtype)
        assert choose.why_not(x, router.linear.weight) is None
        got = router(x, None)
        with monkeypatch.context() as plain:
            plain.setattr(choose, "why_not", lambda *_: "this is the reference")
            want = router(x, None)
        if dtype is torch.float32:
            assert torch.equal(got.experts, want.experts)
        else:  # logits that are rounded tie
            assert (got.experts == want.experts).float().mean() > 0.8
        assert got.weights.dtype == torch.float32
        assert (got.weights - want.weights).abs().max() <= 2 * TOLERANCE[dtype] * want.weights.max()


@needs_kernel
@torch.no_grad()
def test_logits_that_are_not_numbers() -> None:
    """Choices stay within bounds, and distinct."""
    x = torch.full((1, 8), torch.nan)
    for scores in ("softmax", "sigmoid", "logit"):
        experts, _ = choose.choose(x, torch.ones(6, 8), 4, choose.Rule(scores, groups=3, active_groups=2))
        assert len(set(experts[0].tolist())) == 4 and 0 <= int(experts.min()) and int(experts.max()) < 6


@torch.no_grad()
def test_layer_agrees_with_many_tokens() -> None:
    """A token's answer is the same among few and among many."""
    config = MoE.Config(
        experts=8, active=2, hidden=48, router=SigmoidTopK.Config(groups=2), shared=GLU.Config(hidden=32)
    )
    layer = config.build(40).eval()
    for p in layer.parameters():
        p.copy_(weights(*p.shape, seed=p.numel()))
    x = torch.randn(1, 40, 40, generator=torch.Generator().manual_seed(0))
    assert (layer(x)[:, :5] - layer(x[:, :5])).abs().max() < 1e-5


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.no_grad()
def test_perceptron_with_biases(dtype: torch.dtype) -> None:
    up, down = Linear(30, 50), Linear(50, 70)
    for layer in (up, down):
        layer.double()
    for tokens in (1, 3, 8):
        x = torch.randn(1, tokens, 30, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
        narrow = [Linear(30, 50).to(dtype), Linear(50, 70).to(dtype)]
        for a, b in zip(narrow, (up, down), strict=True):
            a.load_state_dict(b.state_dict())
            b.load_state_dict(a.state_dict())
        assert few.why_not(x.to(dtype), None, narrow[0].weight, narrow[1].weight, narrow[0].bias) is None
        got, want = perceptron(x.to(dtype), *narrow, "tanh"), perceptron(x.to(dtype).double(), up, down, "tanh")
        assert got.shape == want.shape and got.dtype == dtype
        assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()

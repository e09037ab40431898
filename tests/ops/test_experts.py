"""Experts of a few tokens in one call, numbers or codes, against float64 on the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from landmark.nn.codes import CodedExperts
from landmark.nn.linear import GroupedLinear
from landmark.nn.moe import MoE
from landmark.nn.router import SigmoidInput, SoftmaxTopK
from landmark.ops.activation import activation
from landmark.ops.linear import cpu
from landmark.ops.moe import experts as few
from landmark.ops.quant.codes import Bits
from landmark.ops.quant.codes import kind as coded_kind
from landmark.ops.quant.codes import reference as codes

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2}  # of the largest element: a few roundings
needs_kernel = pytest.mark.skipif(few.SOURCE.why_not() is not None, reason=str(few.SOURCE.why_not()))
SHAPES = [(64, 96, 8, 2), (37, 50, 3, 1), (130, 34, 40, 9)]  # dim, hidden, experts, active


def stack(
    number: int, rows: int, width: int, bits: Bits | None, dtype: torch.dtype, seed: int
) -> tuple[few.Stack, Tensor]:
    """What a kernel takes, and the numbers that it stands for."""
    weight = torch.randn(number, rows, width, generator=torch.Generator().manual_seed(seed)) * width**-0.5
    if bits is None:
        return few.Stack(weight.to(dtype), None, rows, width), weight.to(dtype).double()
    made = CodedExperts(bits, GroupedLinear(number, width, rows))
    made.fill(weight)
    return made.stack, made.weight.double()


def reference(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, experts: Tensor, scales: Tensor, on_input: bool,
    round_x: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Token by token, expert by expert, rounded where the kernel rounds."""

    def times(w: Tensor, v: Tensor) -> Tensor:
        return w @ (codes.rounded(v[None].float())[0].double() if round_x else v)

    y = torch.zeros(len(x), down.shape[1], dtype=torch.float64)
    for n in range(len(x)):
        for e, scale in zip(experts[n].tolist(), scales[n], strict=True):
            if e < 0:
                continue
            given = (x[n] * scale).to(dtype).double() if on_input else x[n]
            inner = times(up[e], given).to(dtype).double()
            if gate is not None:
                inner = activation("silu")(times(gate[e], given).to(dtype).double()) * inner
            else:
                inner = activation("silu")(inner)
            y[n] += times(down[e], inner.to(dtype).double()) * (1 if on_input else scale)
    return y


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("bits", "round_x"), [(None, False), (4, False), (8, False), (4, True), (8, True)])
@pytest.mark.parametrize(("gated", "on_input"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(("dim", "hidden", "number", "active"), SHAPES)
@torch.no_grad()
def test_experts(
    dim: int, hidden: int, number: int, active: int, gated: bool, on_input: bool, round_x: bool,
    bits: Bits | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    made = [stack(number, hidden, dim, bits, dtype, seed) for seed in range(2 if gated else 1)]
    (*inner, down), (*gate, up, out) = zip(*made, stack(number, dim, hidden, bits, dtype, 2), strict=True)
    kind = cpu.kind(dtype) if bits is None else coded_kind(bits, dtype, round_x)
    assert kind is not None
    for tokens in (1, 2, 7, 16) if bits is None else (1, 2, 7, 20):
        g = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, dim, generator=g).to(dtype)
        experts = torch.stack([torch.randperm(number, generator=g)[:active] for _ in range(tokens)])
        if tokens == 7:
            experts[3] = 0  # all choices one expert
            experts[2, 0] = -1  # a choice that is dropped
        scales = torch.rand(tokens, active, generator=g) + 0.1
        assert few.why_not(x, [*inner, down]) is None

        def run(x: Tensor, experts: Tensor, scales: Tensor) -> Tensor:
            return few.feed_forward(x, kind, inner, down, "silu", experts, scales, on_input)

        got = run(x, experts, scales)
        want = reference(
            x.double(), gate[0] if gate else None, up, out, experts, scales.double(), on_input, round_x, dtype
        )
        assert got.dtype == dtype
        error, most = (got.double() - want).abs(), want.abs().max()
        if round_x:  # a number near the middle of two codes may become the other one
            assert error.mean() <= TOLERANCE[dtype] * most and error.max() <= 0.02 * most
        else:
            assert error.max() <= TOLERANCE[dtype] * most
        last = run(x[-1:], experts[-1:], scales[-1:])
        assert torch.equal(last, got[-1:])  # whoever else is there


@needs_kernel
@pytest.mark.parametrize("router", [SoftmaxTopK.Config(), SigmoidInput.Config()], ids=["softmax", "on input"])
@pytest.mark.parametrize("round_x", [False, True])
@torch.no_grad()
def test_few_and_many_tokens_come_to_the_same(router: SoftmaxTopK.Config | SigmoidInput.Config, round_x: bool) -> None:
    """One call for few tokens, one an expert for many; and a hook on a stack sees what goes through it."""
    torch.manual_seed(0)
    active = 1 if isinstance(router, SigmoidInput.Config) else 2
    module = MoE(MoE.Config(experts=5, active=active, hidden=40, router=router), 48).eval()
    for weight in module.parameters():
        weight.normal_(0, 0.2)
    for name in ("gate", "up", "down"):
        like = getattr(module.experts, name)
        made = CodedExperts(8, like, round_x)
        made.fill(like.weight)
        setattr(module.experts, name, made)
    x = torch.randn(1, 100, 48)
    many = module(x)
    few = torch.cat([module(part) for part in x.split(10, 1)], 1)
    torch.testing.assert_close(few, many, rtol=1e-5, atol=1e-5)
    seen = list[int]()
    with module.experts.up.register_forward_hook(lambda *_: seen.append(1)):
        torch.testing.assert_close(module(x[:, :10]), few[:, :10], rtol=1e-5, atol=1e-5)
    assert seen == [1]


def test_who_cannot() -> None:
    x, numbers = torch.randn(3, 8), [few.Stack(torch.zeros(2, 4, 8), None, 4, 8)]
    codes = [stack(2, 4, 8, 8, torch.float32, 0)[0]]
    assert "gradient" in str(few.why_not(x.clone().requires_grad_(), codes))
    assert "gradient" in str(few.why_not(x, [numbers[0]._replace(codes=torch.zeros(2, 4, 8, requires_grad=True))]))
    assert "1 to 64 tokens" in str(few.why_not(torch.randn(65, 8), codes))
    assert "1 to 16 tokens" in str(few.why_not(torch.randn(17, 8), numbers))
    assert "float64" in str(few.why_not(x.double(), codes))

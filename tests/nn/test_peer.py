"""PEER: equal to a plain transcription of the paper, isolated when decoding, and at home with a million experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from landmark.ctx import Bounds, Ctx
from landmark.nn.peer import PEER, BatchNorm

SMALL = PEER.Config(experts=49, heads=3, active=5, key_dim=8)


def slow(layer: PEER, x: Tensor) -> Tensor:
    """Algorithm of the paper with every expert scored, for tokens x [N, dim], with running statistics."""
    c, norm = layer.cfg, layer.query_norm
    q = x @ layer.query.weight.T
    if norm is not None:
        q = F.batch_norm(q, norm.mean.double(), norm.var.double(), norm.weight, norm.bias, False, 0.0, norm.cfg.eps)
    keys = torch.stack([torch.cat([a, b]) for a in layer.keys[0] for b in layer.keys[1]])
    y = torch.zeros_like(x)
    for head in q.unflatten(-1, (c.heads, -1)).unbind(1):
        scores, at = (head @ keys.T).topk(c.active, -1)
        g = scores.softmax(-1) if c.score == "softmax" else scores.sigmoid()
        h = F.gelu((layer.u.weight[at] * x[:, None]).sum(-1))
        y = y + ((g * h)[..., None] * layer.v.weight[at]).sum(1)
    return y


def layer(cfg: PEER.Config = SMALL, dim: int = 12) -> PEER:
    torch.manual_seed(0)
    made = cfg.build(dim).double().eval()
    with torch.no_grad():
        for p in (*made.parameters(), *(b for b in made.buffers())):
            p.add_(torch.rand_like(p))
    return made


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm", [True, False])
def test_equal_to_the_paper(score: str, norm: bool) -> None:
    query_norm = BatchNorm.Config() if norm else None
    made = layer(PEER.Config(experts=49, heads=3, active=5, key_dim=8, score=score, query_norm=query_norm))
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    parameters = [x, *made.parameters()]
    got, want = made(x), slow(made, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(y.sin().sum(), parameters) for y in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_no_token_depends_on_another_when_evaluated() -> None:
    made = layer()
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    alone = torch.cat([made(x[i : i + 1, t : t + 1]) for i in range(3) for t in range(7)], 1).view_as(x)
    torch.testing.assert_close(made(x), alone, rtol=1e-12, atol=1e-12)


def test_statistics_in_training() -> None:
    """As torch's batch norm, over the tokens inside of sequences."""
    torch.manual_seed(0)
    ours, theirs = BatchNorm.Config().build(6), torch.nn.BatchNorm1d(6)
    for _ in range(3):
        x = torch.randn(10, 6) * 3 + 1
        inside = torch.arange(10) < 8
        torch.testing.assert_close(ours(x, inside)[:8], theirs(x[:8]))
    torch.testing.assert_close(ours.mean, theirs.running_mean)
    torch.testing.assert_close(ours.var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    made = SMALL.build(12).train()
    bounds = Bounds.padded((3, 6), 6)
    ctx = Ctx(bounds.offsets(), bounds)
    x = torch.randn(2, 6, 12)
    first = made(x, ctx)
    x[0, 3:] = 100.0  # padding
    torch.testing.assert_close(made(x, ctx)[0, :3], first[0, :3])
    made.bfloat16()
    assert made.query_norm.mean.dtype == torch.float32
    made.float()
    assert set(made.state_dict()) >= {"query_norm.mean", "query_norm.var"} and "peer_used" in ctx.reports.metrics
    one = SMALL.build(12).train()(torch.randn(1, 1, 12))
    assert one.isfinite().all()


def test_a_million_experts() -> None:
    """Evaluated, and trained: one step reaches the experts that were retrieved, and no others."""
    torch.manual_seed(0)
    made = PEER.Config(heads=2, active=8, key_dim=16).build(8)
    assert made.u.weight.shape == (1024 * 1024, 8)
    x = torch.randn(1, 20, 8)
    with torch.no_grad():
        weights, at = made.eval().route(x[0])
        q = made.query_norm(made.query(x[0])).view(20, 2, 16)
        scores = (q[..., :8] @ made.keys[0].T)[..., :, None] + (q[..., 8:] @ made.keys[1].T)[..., None, :]
        best = scores.flatten(-2).topk(8, -1)
        assert torch.equal(at, best.indices)
        torch.testing.assert_close(weights, best.values.softmax(-1))
    y = made(x)
    y.square().sum().backward()
    for table in (made.u, made.v):
        assert torch.equal(table.weight.grad.any(-1).nonzero().flatten(), at.unique())
    torch.optim.SGD(made.parameters(), 1e-3).step()
    assert made(x).square().sum() < y.square().sum()


def test_what_it_costs() -> None:
    made = SMALL.build(12)
    assert made.active_parameters() == 12 * 24 + 2 * 7 * 4 + 3 * 5 * 2 * 12
    assert made.mixing_flops(99) == 2 * 2 * 56
    big, huge = (PEER.Config(experts=n * n, heads=1, active=1, key_dim=2, query_norm=None).build(1) for n in (10, 1000))
    assert huge.active_parameters() - big.active_parameters() == 2 * (1000 - 10)  # sqrt(N)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 50}, "PEER.experts is 50, which is no square; choose 49"),
        ({"experts": 4, "active": 5}, "PEER.active is 5, but there are 4 experts"),
        ({"key_dim": 7}, "PEER.key_dim is 7"),
        ({"score": "relu"}, "choose 'softmax' or 'sigmoid'"),
        ({"act": "gleu"}, "did you mean 'gelu'"),
        ({"heads": 0}, "PEER.heads is 0"),
    ],
)
def test_bad_configs(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PEER.Config(**fields)

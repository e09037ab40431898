"""Routers against slow transcriptions of their papers' equations in float64, and against transformers' classes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from landmark.ctx import Bounds, Ctx
from landmark.nn.moe import MoE
from landmark.nn.router import Router, RouterConfig, SigmoidInput, SigmoidTopK, SoftmaxTopK
from landmark.nn.router_capacity import GShard, NoisyTopK, Switch

DIM = 12


def made(cfg: RouterConfig, experts: int, active: int, seed: int = 0) -> Router:
    """A router in float64 whose matrices are random, in training mode."""
    router = cfg.build(DIM, experts, active).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in router.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.5)
    return router.train()


def tokens(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context(*lengths: int) -> Ctx:
    bounds = Bounds.of_lengths(lengths)
    return Ctx(bounds.offsets(), bounds)


def said(ctx: Ctx, name: str) -> Tensor:
    total, count = ctx.reports.metrics[name]
    return total / count


# 1701.06538


@pytest.mark.parametrize(("experts", "active"), [(6, 2), (5, 1), (4, 3), (3, 3)])
def test_noisy_top_k(experts: int, active: int) -> None:
    router = made(NoisyTopK.Config(importance=0.3, load=0.7), experts, active)
    assert isinstance(router, NoisyTopK)
    x, ctx = tokens(9), context(9)
    torch.manual_seed(7)
    routing = router(x, ctx)
    torch.manual_seed(7)
    noise = torch.randn(9, experts, dtype=torch.float64)
    importance, load = torch.zeros(experts).double(), torch.zeros(experts).double()
    gate, spreading = router.weight.detach(), router.noise_weight.detach()
    for t in range(9):
        clean = [float(gate[i] @ x[t]) for i in range(experts)]
        spread = [math.log1p(math.exp(float(spreading[i] @ x[t]))) for i in range(experts)]
        h = [clean[i] + float(noise[t, i]) * spread[i] for i in range(experts)]  # eq. 4
        kept = sorted(range(experts), key=lambda i: -h[i])[:active]  # eq. 5
        total = sum(math.exp(h[i]) for i in kept)
        gates = {i: math.exp(h[i]) / total for i in kept}  # eq. 3
        found = dict(zip(routing.experts[t].tolist(), routing.weights[t].tolist(), strict=True))
        assert found == pytest.approx(gates, abs=1e-12)
        for i in kept:
            importance[i] += gates[i]  # eq. 6
        for i in range(experts):
            others = sorted((h[j] for j in range(experts) if j != i), reverse=True)
            if active > len(others):
                load[i] += 1
            else:
                z = (clean[i] - others[active - 1]) / spread[i]  # eq. 9
                load[i] += 0.5 * (1 + math.erf(z / math.sqrt(2)))  # eq. 10

    def cv2(v: Tensor) -> float:
        return float(((v - v.mean()) ** 2).mean() / v.mean() ** 2)

    assert float(said(ctx, "router_importance")) == pytest.approx(cv2(importance), abs=1e-8)  # eq. 7
    assert float(said(ctx, "router_noisy_load")) == pytest.approx(cv2(load), abs=1e-8)  # eq. 11
    assert sum(ctx.reports.losses).item() == pytest.approx(0.3 * cv2(importance) + 0.7 * cv2(load), abs=1e-8)
    router.eval()
    assert torch.equal(router(x, None).experts, router(x, None).experts), "no noise in evaluation"


def test_noisy_gates_begin_as_zeros() -> None:
    moe = MoE.Config(experts=4, active=2, hidden=8, router=NoisyTopK.Config()).build(DIM)
    assert isinstance(moe.router, NoisyTopK)
    moe.router.reset_parameters()
    assert not moe.router.weight.any() and not moe.router.noise_weight.any()


# GShard, GLaM, Switch


def gshard(p: Tensor, capacity: int, draws: Tensor | None) -> tuple[list[dict[int, float]], float, int]:
    """Algorithm 1 of 2006.16668, with l_aux times E^2: gates of every token, and how many choices were dropped."""
    n, experts = p.shape
    counters, gates = [0] * experts, [dict[int, float]() for _ in range(n)]
    best = [sorted(range(experts), key=lambda e: -float(p[s, e]))[:2] for s in range(n)]
    for s, (a, b) in enumerate(best):
        if counters[a] < capacity:
            gates[s][a] = float(p[s, a] / (p[s, a] + p[s, b]))
        counters[a] += 1
    aux = sum(counters[e] / n * float(p[:, e].mean()) for e in range(experts)) * experts
    for s, (a, b) in enumerate(best):
        g2 = float(p[s, b] / (p[s, a] + p[s, b]))
        if counters[b] < capacity and (draws is None or 2 * g2 > float(draws[s])):
            gates[s][b] = g2
        counters[b] += 1
    return gates, aux, 2 * n - sum(map(len, gates))


@pytest.mark.parametrize("random_second", [False, True])
@pytest.mark.parametrize("factor", [0.4, 1.0, 4.0])
def test_gshard(factor: float, random_second: bool) -> None:
    cfg = GShard.Config(capacity_factor=factor, random_second=random_second, balance=0.5, z=0.25)
    router, x, ctx = made(cfg, 5, 2), tokens(23), context(20, 3)
    torch.manual_seed(3)
    routing = router(x, ctx)
    torch.manual_seed(3)
    draws = torch.rand(23, dtype=torch.float64) if random_second else None
    logits = (x @ router.linear.weight.detach().T).detach()
    gates, aux, dropped = gshard(logits.softmax(-1).detach(), math.ceil(factor * 2 * 23 / 5), draws)
    for t in range(23):
        found = {e: w for e, w in zip(routing.experts[t].tolist(), routing.weights[t].tolist(), strict=True) if e >= 0}
        assert found == pytest.approx(gates[t], abs=1e-12)
    assert float(said(ctx, "router_balance")) == pytest.approx(aux)
    assert float(said(ctx, "router_z")) == pytest.approx(float(logits.logsumexp(-1).square().mean()))
    assert ctx.reports.metrics["router_dropped"] == (torch.tensor(dropped), 46)
    assert dropped or factor > 1
    assert sum(ctx.reports.losses).item() == pytest.approx(0.5 * aux + 0.25 * float(said(ctx, "router_z")))
    assert not router.eval()(x, ctx).dropping, "evaluation drops nothing"


@pytest.mark.parametrize("factor", [0.3, 1.0])
@torch.no_grad()
def test_switch(factor: float) -> None:
    router, x, ctx = made(Switch.Config(capacity_factor=factor, jitter=0.0, balance=1.0), 4, 1), tokens(30), context(30)
    routing = router(x, ctx)
    p, used, capacity = (x @ router.linear.weight.detach().T).softmax(-1), [0] * 4, math.ceil(factor * 30 / 4)
    for t in range(30):
        e = int(p[t].argmax())
        assert routing.experts[t, 0] == (e if used[e] < capacity else -1)
        assert float(routing.weights[t, 0]) == pytest.approx(float(p[t, e]))
        used[e] += 1
    f = torch.tensor(used) / 30
    assert float(said(ctx, "router_balance")) == pytest.approx(4 * float((f * p.mean(0)).sum()))  # 2101.03961, eq. 4


def test_jitter_is_of_training_only() -> None:
    router, x = made(Switch.Config(jitter=0.5), 4, 1), tokens(30)
    assert not torch.equal(router(x, None).weights, router(x, None).weights)
    router.eval()
    assert torch.equal(
        router(x, None).weights, (x @ router.linear.weight.detach().T).softmax(-1).amax(-1, keepdim=True)
    )


# Softmax: Mixtral, Qwen3-MoE, DeepSeekMoE, DeepSeek-V2


def their_config(kind: str, **keys: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, hidden_size=DIM, num_attention_heads=4, moe_intermediate_size=8, **keys)


def their_choice(theirs: torch.nn.Module, x: Tensor) -> list[dict[int, float]]:
    _, weights, experts = theirs(x)
    return [dict(zip(e, w, strict=True)) for e, w in zip(experts.tolist(), weights.tolist(), strict=True)]


def our_choice(router: Router, x: Tensor) -> list[dict[int, float]]:
    routing = router(x, None)
    pairs = zip(routing.experts.tolist(), routing.weights.tolist(), strict=True)
    return [dict(zip(e, w, strict=True)) for e, w in pairs]


def assert_same_choices(ours: list[dict[int, float]], theirs: list[dict[int, float]]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("renormalise", [False, True])
def test_softmax_as_transformers_qwen(renormalise: bool) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    keys = dict(num_experts=16, num_experts_per_tok=3, norm_topk_prob=renormalise)
    theirs, ours = (
        Qwen3MoeTopKRouter(their_config("qwen3_moe", **keys)),
        made(SoftmaxTopK.Config(renormalise=renormalise), 16, 3),
    )
    ours.float()
    with torch.no_grad():
        theirs.weight.copy_(ours.linear.weight)
    x = tokens(40).float()
    assert_same_choices(our_choice(ours, x), their_choice(theirs, x))


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_softmax_as_transformers_deepseek_v2(groups: tuple[int, int]) -> None:
    from transformers.models.deepseek_v2 import modeling_deepseek_v2

    method = "greedy" if groups == (1, 1) else "group_limited_greedy"
    keys = dict(n_routed_experts=16, num_experts_per_tok=3, n_group=groups[0], topk_group=groups[1])
    config = their_config("deepseek_v2", **keys, topk_method=method, routed_scaling_factor=2.5, norm_topk_prob=False)
    theirs = modeling_deepseek_v2.DeepseekV2TopkRouter(config)
    cfg = SoftmaxTopK.Config(renormalise=False, scale=2.5, groups=groups[0], active_groups=groups[1])
    ours = made(cfg, 16, 3).float()
    with torch.no_grad():
        theirs.weight.copy_(ours.linear.weight)
    x = tokens(40).float()
    assert_same_choices(our_choice(ours, x), their_choice(theirs, x))


def test_deepseek_moe_losses() -> None:
    """2401.06066, eq. 12-17, with two experts of eight in four groups."""
    cfg = SoftmaxTopK.Config(renormalise=False, groups=4, active_groups=4, balance=0.5, group_balance=0.25, z=0.125)
    router, x, ctx = made(cfg, 8, 2), tokens(17), context(10, 7)
    routing = router(x, ctx)
    logits = (x @ router.linear.weight.detach().T).detach()
    s = logits.softmax(-1)
    f = [8 / (2 * 17) * sum(i in row for row in routing.experts.tolist()) for i in range(8)]
    p = [float(s[:, i].mean()) for i in range(8)]
    expert = sum(a * b for a, b in zip(f, p, strict=True))
    group = sum((f[2 * d] + f[2 * d + 1]) / 2 * (p[2 * d] + p[2 * d + 1]) for d in range(4))
    z = float(logits.logsumexp(-1).square().mean())
    assert float(said(ctx, "router_balance")) == pytest.approx(expert)
    assert float(said(ctx, "router_group_balance")) == pytest.approx(group)
    assert float(said(ctx, "router_z")) == pytest.approx(z)
    assert sum(ctx.reports.losses).item() == pytest.approx(0.5 * expert + 0.25 * group + 0.125 * z)


def test_communication_loss() -> None:
    """DeepSeek-V2, eq. 29-31: three experts of twelve, in two of four groups."""
    cfg = SoftmaxTopK.Config(renormalise=False, groups=4, active_groups=2, communication=0.5)
    router, x, ctx = made(cfg, 12, 3), tokens(19), context(19)
    routing, s = router(x, ctx), (x @ router.linear.weight.detach().T).softmax(-1).detach()
    total = 0.0
    for d in range(4):
        sent = sum(any(e // 3 == d for e in row) for row in routing.experts.tolist())
        total += 4 / (2 * 19) * sent * sum(s[:, j].mean().item() for j in range(3 * d, 3 * d + 3))
    assert said(ctx, "router_communication").item() == pytest.approx(total)
    assert sum(ctx.reports.losses).item() == pytest.approx(0.5 * total)


def test_figures() -> None:
    router, x, ctx = made(SoftmaxTopK.Config(), 4, 2), tokens(10), context(10)
    counts = torch.bincount(router(x, ctx).experts.flatten(), minlength=4)
    s = (x @ router.linear.weight.detach().T).softmax(-1)
    assert float(said(ctx, "router_load")) == pytest.approx(float(counts.max() / 5))
    assert float(said(ctx, "router_entropy")) == pytest.approx(float(-(s * s.log()).sum(-1).mean()))
    assert not ctx.reports.losses
    ctx = context(10)
    router.eval()(x, ctx)
    assert not ctx.reports.metrics, "evaluation says nothing"


# DeepSeek-V3


@pytest.mark.parametrize(("groups", "active_groups"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("renormalise", [False, True])
def test_sigmoid_as_transformers_deepseek_v3(groups: int, active_groups: int, renormalise: bool) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    keys = dict(n_routed_experts=16, num_experts_per_tok=3, n_group=groups, topk_group=active_groups)
    theirs = DeepseekV3TopkRouter(
        their_config("deepseek_v3", **keys, norm_topk_prob=renormalise, routed_scaling_factor=2.5)
    )
    cfg = SigmoidTopK.Config(renormalise=renormalise, scale=2.5, groups=groups, active_groups=active_groups)
    ours = made(cfg, 16, 3).float().eval()
    assert isinstance(ours, SigmoidTopK)
    with torch.no_grad():
        theirs.weight.copy_(ours.linear.weight)
        ours.bias.copy_(torch.randn(16, generator=torch.Generator().manual_seed(5)))
        theirs.e_score_correction_bias.copy_(ours.bias)
    x = tokens(40).float()
    assert_same_choices(our_choice(ours, x), their_choice(theirs, x))


def test_sequence_balance() -> None:
    """2412.19437, eq. 17-20: of each sequence by itself, averaged over tokens."""
    lengths, active, experts = (9, 1, 5), 2, 6
    router, x, ctx = made(SigmoidTopK.Config(balance=0.5), experts, active), tokens(15), context(*lengths)
    routing, s = router(x, ctx), (x @ router.linear.weight.detach().T).sigmoid()
    total, at = 0.0, 0
    for n in lengths:
        chosen, share = routing.experts[at : at + n].tolist(), s[at : at + n] / s[at : at + n].sum(-1, keepdim=True)
        for i in range(experts):
            f = experts / (active * n) * sum(i in row for row in chosen)
            total += f * float(share[:, i].mean()) * n
        at += n
    assert float(said(ctx, "router_balance")) == pytest.approx(total / 15)
    assert sum(ctx.reports.losses).item() == pytest.approx(0.5 * total / 15)


def test_the_bias_follows_the_load() -> None:
    router = made(SigmoidTopK.Config(bias_rate=0.01), 4, 1)
    assert isinstance(router, SigmoidTopK)
    with torch.no_grad():
        router.linear.weight.zero_()
        router.linear.weight[2] = 1.0
    x = tokens(8).abs()  # all of them choose expert 2
    for _ in range(3):  # micro-batches
        router(x, None)
    router.eval()(x, None)  # does not count
    router.train().adjust(list)
    assert router.bias.tolist() == pytest.approx([0.01, 0.01, -0.01, 0.01])
    router.adjust(list)  # nothing was counted
    assert router.bias.tolist() == pytest.approx([0.01, 0.01, -0.01, 0.01])
    router(x, None)
    other = [24.0, 0.0, 0.0, 0.0]  # of another process; the sum is [24, 0, 8, 0], its mean 8
    router.adjust(lambda mine: [a + b for a, b in zip(mine, other, strict=True)])
    assert router.bias.tolist() == pytest.approx([0.0, 0.02, -0.01, 0.02])


def test_the_bias_steers_the_choice_alone() -> None:
    router, x = made(SigmoidTopK.Config(renormalise=False), 6, 2).eval(), tokens(20)
    assert isinstance(router, SigmoidTopK)
    router.bias[3] = 10.0
    routing = router(x, None)
    scores = (x @ router.linear.weight.detach().T).sigmoid()
    assert (routing.experts == 3).any(-1).all()
    torch.testing.assert_close(routing.weights, scores.gather(-1, routing.experts))


@pytest.mark.parametrize(
    ("cfg", "active"),
    [
        (SoftmaxTopK.Config(balance=1.0), 2),
        (SoftmaxTopK.Config(groups=4, group_balance=1.0), 2),
        (SigmoidTopK.Config(balance=1.0, bias_rate=0.0), 2),
        (SigmoidTopK.Config(balance=0.0, bias_rate=0.01), 2),
        (SigmoidInput.Config(balance=1.0), 1),
        (NoisyTopK.Config(), 2),
        (GShard.Config(balance=1.0), 2),
        (Switch.Config(balance=1.0), 1),
    ],
)
def test_what_is_to_even_the_load_does(cfg: RouterConfig, active: int) -> None:
    """From routers that prefer a few experts, by their losses and the bias alone: the busiest of eight gets more than
    1.8 times the mean load at the beginning, and less than 1.5 times at the end."""
    router = made(cfg, 8, active)
    lean = torch.ones(DIM, dtype=torch.float64)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.3)
    loads = []
    for step in range(200):
        ctx = context(400)
        router(tokens(400, seed=step) + lean, ctx)
        loads.append(float(said(ctx, "router_load")))
        if ctx.reports.losses:
            sum(ctx.reports.losses, torch.zeros(())).backward()
            optimizer.step()
            optimizer.zero_grad()
        if isinstance(router, SigmoidTopK):
            router.adjust(list)
    assert sum(loads[:3]) / 3 > 1.8 and sum(loads[-3:]) / 3 < 1.5, (loads[:3], loads[-3:])


# Bad input


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoE.Config(experts=4, active=5, hidden=8, router=SoftmaxTopK.Config()), "MoE.active is 5"),
        (lambda: MoE.Config(experts=0, active=1, hidden=8, router=SoftmaxTopK.Config()), "MoE.experts is 0"),
        (lambda: MoE.Config(experts=8, active=2, hidden=8, router=Switch.Config()), "Switch chooses 1"),
        (lambda: MoE.Config(experts=8, active=1, hidden=8, router=GShard.Config()), "GShard chooses 2"),
        (
            lambda: MoE.Config(experts=8, active=2, hidden=8, router=SoftmaxTopK.Config(groups=3, active_groups=2)),
            "SoftmaxTopK.groups is 3",
        ),
        (
            lambda: MoE.Config(experts=8, active=5, hidden=8, router=SigmoidTopK.Config(groups=4, active_groups=2)),
            "active_groups = 2 leave only 4 experts",
        ),
        (
            lambda: MoE.Config(experts=8, active=2, hidden=8, router=SigmoidTopK.Config(groups=8, active_groups=8)),
            "SigmoidTopK.groups is 8: 8 experts have no such equal groups of at least 2",
        ),
        (lambda: SigmoidTopK.Config(groups=2, active_groups=3), "SigmoidTopK.active_groups is 3"),
        (lambda: Switch.Config(capacity_factor=0.0), "Switch.capacity_factor is 0.0"),
        (lambda: GShard.Config(capacity_factor=-1.0), "GShard.capacity_factor is -1.0"),
        (lambda: Switch.Config(jitter=1.0), "Switch.jitter is 1.0"),
        (lambda: SoftmaxTopK.Config(balance=-0.1), "SoftmaxTopK.balance is -0.1"),
        (lambda: NoisyTopK.Config(load=float("nan")), "NoisyTopK.load is nan"),
        (lambda: SigmoidInput.Config(balance=-1.0), "SigmoidInput.balance is -1.0"),
    ],
)
def test_bad_configs(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()

"""The layer of experts: what a token gets, what it costs, who sees whom, and the bias that training moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import landmark
from landmark.config import from_dict, to_dict
from landmark.ctx import Bounds, Ctx
from landmark.models.base import Init, Model, init_weights
from landmark.models.decoder import Decoder
from landmark.models.inspect import count, figures
from landmark.nn.feedforward import GLU
from landmark.nn.moe import GroupedLinear, MoE
from landmark.nn.residual import PreNorm
from landmark.nn.router import RouterConfig, SigmoidInput, SigmoidTopK, SoftmaxTopK
from landmark.nn.router_capacity import GShard, NoisyTopK, Switch
from landmark.objectives.lm import CausalLM
from landmark.ops.fused import activate
from landmark.train import Checkpoints, Constant, Muon, Settings, fit
from landmark.train.optim.base import roles
from tests.train.common import Stream, batch_of, tiny

DIM, EXPERTS = 16, 6
ROUTERS: list[tuple[RouterConfig, int]] = [
    (SoftmaxTopK.Config(balance=0.1, z=0.1), 2),
    (SoftmaxTopK.Config(renormalise=False, scale=2.0, groups=3, active_groups=2, group_balance=0.1), 3),
    (SigmoidTopK.Config(groups=3, active_groups=2), 2),
    (SigmoidInput.Config(balance=0.1), 1),
    (SigmoidInput.Config(), 2),
    (NoisyTopK.Config(), 2),
    (GShard.Config(capacity_factor=0.5), 2),
    (Switch.Config(capacity_factor=0.5), 1),
]
every_router = pytest.mark.parametrize(
    ("router", "active"), ROUTERS, ids=[f"{r.type_name}-{n}" for n, (r, _) in enumerate(ROUTERS)]
)


def made(router: RouterConfig, active: int, **keys: object) -> MoE:
    config = MoE.Config(experts=EXPERTS, active=active, hidden=24, router=router, **keys)
    assert from_dict(to_dict(config)) == config
    torch.manual_seed(0)
    moe = config.build(DIM)
    init_weights(moe, Init(std=0.3))
    for p in moe.router.parameters():
        torch.nn.init.normal_(p)
    return moe


def slow(moe: MoE, x: Tensor) -> Tensor:
    """x [N, dim], one token and one expert after the other."""
    routing, outs = moe.router(x, None), []
    for t in range(len(x)):
        out = torch.zeros(DIM, dtype=x.dtype) if moe.shared is None else moe.shared(x[t])
        for e, weight in zip(routing.experts[t].tolist(), routing.weights[t], strict=True):
            read = x[t] * weight if routing.on_input else x[t]
            hidden = moe.experts.up.expert(e)(read)
            if moe.experts.gate is None:
                hidden = activate(hidden, moe.cfg.act)
            else:
                hidden = activate(moe.experts.gate.expert(e)(read), moe.cfg.act) * hidden
            said = moe.experts.down.expert(e)(hidden)
            out = out + (said if routing.on_input else weight * said)
        outs.append(out)
    return torch.stack(outs)


@every_router
@pytest.mark.parametrize("plain", [False, True])
def test_against_one_expert_after_the_other(router: RouterConfig, active: int, plain: bool) -> None:
    keys = {"gated": False, "act": "relu"} if plain else {"shared": GLU.Config(hidden=8)}
    moe = made(router, active, **keys).eval()
    x = torch.randn(3, 7, DIM)
    with torch.no_grad():
        torch.testing.assert_close(moe(x).flatten(0, 1), slow(moe, x.flatten(0, 1)), rtol=1e-5, atol=1e-5)


@every_router
def test_every_parameter_learns_in_training(router: RouterConfig, active: int) -> None:
    moe, x = made(router, active, shared=GLU.Config(hidden=8)).train(), torch.randn(4, 20, DIM, requires_grad=True)
    bounds = Bounds(4, 20)
    ctx = Ctx(bounds.offsets(), bounds)
    y = moe(x, ctx)
    (y.square().mean() + sum(ctx.reports.losses, torch.zeros(()))).backward()
    for name, p in moe.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    assert x.grad is not None and x.grad.isfinite().all()


def test_gradients_of_a_whole_layer() -> None:
    moe = made(SoftmaxTopK.Config(renormalise=False), 2, shared=GLU.Config(hidden=4)).double().eval()
    x = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: moe(x[None]), (x,))
    ours = torch.autograd.grad(moe(x[None]).square().sum(), list(moe.parameters()))
    slowly = torch.autograd.grad(slow_gradients(moe, x), list(moe.parameters()))
    for a, b in zip(ours, slowly, strict=True):
        torch.testing.assert_close(a, b)


def slow_gradients(moe: MoE, x: Tensor) -> Tensor:
    """The same loss, from masked dense products over all experts."""
    routing = moe.router(x, None)
    assert moe.experts.gate is not None and moe.shared is not None
    weights = torch.zeros(len(x), EXPERTS, dtype=x.dtype).scatter(1, routing.experts, routing.weights)
    gate, up = (torch.einsum("nd,ehd->neh", x, m.weight) for m in (moe.experts.gate, moe.experts.up))
    said = torch.einsum("neh,edh->ned", torch.nn.functional.silu(gate) * up, moe.experts.down.weight)
    return (torch.einsum("ne,ned->nd", weights, said) + moe.shared(x)).square().sum()


def test_an_expert_s_linear_layer_is_a_view() -> None:
    stack = GroupedLinear(3, 8, 4)
    torch.nn.init.normal_(stack.weight)
    views = list(stack.each())
    assert len(views) == 3 and all(isinstance(view, torch.nn.Linear) for view in views)
    with torch.no_grad():
        views[1].weight.zero_()
    assert not stack.weight[1].any() and stack.weight[0].any()
    x = torch.randn(5, 8)
    torch.testing.assert_close(stack(x, torch.tensor([2, 0, 3]))[2:], views[2](x[2:]))


def test_tokens_outside_of_sequences_do_not_count() -> None:
    moe, x = made(SoftmaxTopK.Config(balance=1.0), 2), torch.randn(2, 8, DIM)
    bounds = Bounds.padded((8, 3), 8)
    ctx, alone = Ctx(bounds.offsets(), bounds), Ctx(torch.arange(11)[None], Bounds(1, 11))
    y, flat = moe(x, ctx), moe(x.flatten(0, 1)[None, :11], alone)
    torch.testing.assert_close(y.flatten(0, 1)[:11], flat[0])
    assert not y[1, 3:].any()
    assert ctx.reports.metrics == alone.reports.metrics


@every_router
def test_a_batch_without_a_token(router: RouterConfig, active: int) -> None:
    moe, x = made(router, active).train(), torch.randn(1, 4, DIM)
    ctx = Ctx(torch.zeros(1, 4, dtype=torch.long), Bounds(1, 4, ()))
    y = moe(x, ctx)
    assert not y.any() and not ctx.reports.losses and not ctx.reports.metrics
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in moe.parameters())


@pytest.mark.parametrize("factor", [0.25, 1.0])
def test_a_full_expert_lets_tokens_pass_by(factor: float) -> None:
    """In training; in evaluation all are served."""
    moe, x = made(Switch.Config(capacity_factor=factor, jitter=0.0), 1), torch.randn(1, 60, DIM)
    ctx = Ctx(torch.arange(60)[None], Bounds(1, 60))
    with torch.no_grad():
        trained, served = moe.train()(x, ctx)[0], moe.eval()(x)[0]
    silent = ~trained.any(-1)
    dropped, choices = ctx.reports.metrics["router_dropped"]
    assert silent.sum() == dropped and choices == 60
    assert served.any(-1).all()
    torch.testing.assert_close(trained[~silent], served[~silent])


def test_active_parameters_and_flops() -> None:
    moe = made(SoftmaxTopK.Config(), 2, shared=GLU.Config(hidden=8))
    expert, router, shared = 3 * DIM * 24, DIM * EXPERTS, 3 * DIM * 8
    assert count(moe) == EXPERTS * expert + router + shared
    assert moe.active_parameters() == 2 * expert + router + shared


def sparse(router: RouterConfig, active: int = 2) -> Model:
    """The tiny model of the training tests, its second feed-forward replaced by experts."""
    plain = tiny()
    assert isinstance(plain, Decoder)
    first, second = plain.cfg.layers
    experts = MoE.Config(experts=EXPERTS, active=active, hidden=16, router=router, shared=GLU.Config(hidden=8))
    ffn = second["ffn"]  # type: ignore[index]
    assert isinstance(ffn, PreNorm.Config)
    torch.manual_seed(0)
    return replace(plain.cfg, layers=(first, {**second, "ffn": replace(ffn, fn=experts)})).build()  # type: ignore[dict-item]


def settings(**keys: object) -> Settings:
    return Settings(steps=6, accumulate=2, schedule=Constant(), peak_flops=1e12, **keys)  # type: ignore[arg-type]


def bias_of(model: Model) -> Tensor:
    router = next(m for m in model.modules() if isinstance(m, SigmoidTopK))
    return router.bias.clone()


def test_the_bias_after_training(tmp_path: Path) -> None:
    """The same bits whether activations are kept or computed again, whether the run is one or was stopped; moved once
    an update, in bfloat16 too."""
    ends = {}
    for name, keys in {"plain": {}, "again": {"recompute": True}, "half": {"dtype": "bfloat16"}}.items():
        model = sparse(SigmoidTopK.Config(bias_rate=0.125))
        fit(model, CausalLM(), Stream(), settings(**keys), out=tmp_path / name)
        bias = bias_of(model)
        assert bias.dtype == torch.float32 and bias.any()
        assert torch.equal(bias / 0.125, (bias / 0.125).round()) and bias.abs().max() <= 6 * 0.125
        ends[name] = bias
    assert torch.equal(ends["plain"], ends["again"])
    assert torch.equal(bias_of(landmark.load(tmp_path / "half")), ends["half"])
    assert torch.equal(bias_of(landmark.load(tmp_path / "plain", dtype="bfloat16")), ends["plain"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stopped_run_goes_on_to_the_same_bits(dtype: str, tmp_path: Path) -> None:
    plan = settings(dtype=dtype, checkpoints=Checkpoints(every=2), optimizer=Muon.Config())
    whole = sparse(SigmoidTopK.Config(bias_rate=1e-3))
    fit(whole, CausalLM(), Stream(), plan, out=tmp_path / "whole")
    stopped = sparse(SigmoidTopK.Config(bias_rate=1e-3))
    with pytest.raises(ValueError, match="the data ended"):
        fit(stopped, CausalLM(), Stream(end=8), plan, out=tmp_path / "stopped")
    resumed = sparse(SigmoidTopK.Config(bias_rate=1e-3))
    fit(resumed, CausalLM(), Stream(), plan, out=tmp_path / "stopped", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert bias_of(whole).any()


def test_the_bias_stays_float32() -> None:
    model = sparse(SigmoidTopK.Config())
    router = next(m for m in model.modules() if isinstance(m, SigmoidTopK))
    router.bias += 1 / 3
    before = router.bias.clone()
    for cast in (model.bfloat16, model.half, model.double, model.float):
        cast()
        assert router.bias.dtype == torch.float32 and torch.equal(router.bias, before)
    assert model.to("meta").get_buffer("layers.1.ffn.fn.router.bias").dtype == torch.float32


def test_stacks_are_matrices_to_the_optimisers() -> None:
    """And Muon makes each expert's update orthogonal by itself."""
    model = sparse(SoftmaxTopK.Config())
    role = roles(model)
    assert {role[f"layers.1.ffn.fn.experts.{name}.weight"] for name in ("gate", "up", "down")} == {"matrix"}
    stack = model.get_parameter("layers.1.ffn.fn.experts.up.weight")
    twins = [torch.nn.Parameter(matrix.detach().clone()) for matrix in stack]
    grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)[:, None, None]
    from landmark.train.optim.base import Named

    for tensors, grads in (([stack], [grad]), (twins, list(grad))):
        (optimizer,) = Muon.Config().build([Named(str(i), p, "matrix") for i, p in enumerate(tensors)])
        for p, g in zip(tensors, grads, strict=True):
            p.grad = g
        optimizer.step()
    for matrix, twin in zip(stack, twins, strict=True):
        torch.testing.assert_close(matrix, twin, rtol=1e-2, atol=1e-3)  # bfloat16 within


def test_initial_weights_of_experts() -> None:
    """As any matrix's: the last of a residual sublayer smaller by the square root of their number."""
    model = sparse(SoftmaxTopK.Config())
    experts = model.get_submodule("layers.1.ffn.fn")
    assert isinstance(experts, MoE) and isinstance(experts.shared, GLU)
    assert experts.experts.up.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for end in (experts.experts.down.weight, experts.shared.down.weight):
        assert end.std().item() == pytest.approx(0.02 / 2, rel=0.15)  # four sublayers


@every_router
def test_a_model_with_experts(router: RouterConfig, active: int, tmp_path: Path) -> None:
    """Packed documents do not see each other, decoding equals the forward pass, what is saved is read back."""
    model = sparse(router, active).eval()
    assert isinstance(model, Decoder)
    landmark.save(model, tmp_path)
    back = landmark.load(tmp_path)
    ids = batch_of(0).tokens[:2]
    with torch.no_grad():
        whole = model(ids)
        assert torch.equal(back(ids), whole)
        segments = torch.ones_like(ids)
        segments[:, 10:] = 2
        torch.testing.assert_close(model(ids, segments=segments)[:, 10:], model(ids[:, 10:]), rtol=1e-4, atol=1e-5)
        state = model.new_state(2, ids.shape[1])
        steps = [model(ids[:, :9], state=state)] + [model(ids[:, t : t + 1], state=state) for t in range(9, 24)]
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    assert figures(model).active < figures(model).parameters

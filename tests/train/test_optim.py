"""Optimisers against their papers' equations in float64, and against torch's own where it has them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from landmark.train.optim import Adafactor, AdamW, Lion, Muon, Updater
from landmark.train.optim.base import Named, roles
from landmark.train.optim.muon import orthogonalise
from tests.train.common import same, tiny

STEPS = 6


def gradients(seed: int = 1, shape: tuple[int, ...] = (6, 10)) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(STEPS)]


def start(shape: tuple[int, ...] = (6, 10)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ours(config, role: str = "matrix", shape: tuple[int, ...] = (6, 10)) -> Tensor:
    p = nn.Parameter(start(shape))
    optimizers = config.build([Named("p", p, role)])
    for grad in gradients(shape=shape):
        p.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    return p.detach()


def torchs(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], shape: tuple[int, ...] = (6, 10)) -> Tensor:
    p = nn.Parameter(start(shape))
    optimizer = make([p])
    for grad in gradients(shape=shape):
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


def test_adamw_is_the_papers_update() -> None:
    """Loshchilov & Hutter 2019, algorithm 2."""
    lr, decay, b1, b2, eps = 1e-2, 0.1, 0.9, 0.95, 1e-8
    p, m, v = start(), torch.zeros(6, 10), torch.zeros(6, 10)
    for t, g in enumerate(gradients(), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - lr * decay * p - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    torch.testing.assert_close(ours(AdamW.Config(lr=lr, weight_decay=decay)), p)


def test_lion_is_the_papers_update() -> None:
    """Chen et al. 2023, algorithm 2."""
    lr, decay, b1, b2 = 1e-2, 0.5, 0.9, 0.99
    p, m = start(), torch.zeros(6, 10, dtype=torch.float64)
    for g in gradients():
        update = torch.sign(b1 * m + (1 - b1) * g)
        p = p - lr * (update + decay * p)
        m = b2 * m + (1 - b2) * g
    torch.testing.assert_close(ours(Lion.Config(lr=lr, weight_decay=decay, betas=(b1, b2))), p)


def test_adafactor_of_a_matrix_is_the_papers_update() -> None:
    """Shazeer & Stern 2018, algorithm 4, with algorithm 6's defaults and rho_t = 0.01."""
    p, row, column = start(), torch.zeros(6, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    for t, g in enumerate(gradients(), 1):
        rate = max(1e-3, p.square().mean().sqrt().item()) * 0.01
        beta = 1 - t**-0.8
        square = g * g + 1e-30
        row, column = beta * row + (1 - beta) * square.sum(1), beta * column + (1 - beta) * square.sum(0)
        update = g / (torch.outer(row, column) / row.sum()).sqrt()
        p = p - rate * update / max(1.0, update.square().mean().sqrt().item())
    torch.testing.assert_close(ours(Adafactor.Config(lr=0.01)), p)


@pytest.mark.parametrize("shape", [(7,), (5, 9)])
def test_adafactor_is_torchs(shape: tuple[int, ...]) -> None:
    theirs = torchs(lambda p: torch.optim.Adafactor(p, lr=1e-2, eps=(1e-30, 1e-3), weight_decay=0.1), shape)
    torch.testing.assert_close(ours(Adafactor.Config(lr=1e-2, weight_decay=0.1), shape=shape), theirs)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_muon_is_torchs(shape: tuple[int, ...]) -> None:
    """torch orthogonalises in bfloat16, so the updates agree to its resolution."""
    config = Muon.Config(lr=1e-2, weight_decay=0.1)
    theirs = torchs(lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), shape)
    moved = (theirs - start(shape)).abs().max()
    assert (ours(config, shape=shape) - theirs).abs().max() < 0.02 * moved


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (3, 4, 7)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalise(x, 5))
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inside = (u.mT @ orthogonalise(x, 5) @ v.mT).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inside.sort(-1).values, values.sort(-1).values)  # the same singular vectors


def test_roles_and_decay() -> None:
    free, tied = tiny(), tiny(tie_word_embeddings=True)
    names = roles(free)
    assert names["embed.tokens.weight"] == "embedding" and names["head.linear.weight"] == "head"
    assert names["layers.0.attn.fn.q.weight"] == "matrix" and names["layers.0.attn.norm.weight"] == "vector"
    assert "head.linear.weight" not in roles(tied) and len(roles(tied)) == len(list(tied.parameters()))
    updater = Updater(free, Muon.Config())
    muon, adamw = updater.optimizers
    assert isinstance(muon, Muon) and isinstance(adamw, AdamW)
    hidden = {id(p) for name, p in free.named_parameters() if names[name] == "matrix"}
    assert {id(p) for group in muon.param_groups for p in group["params"]} == hidden
    decayed = {id(p) for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(free.get_parameter("head.linear.weight"))}


@pytest.mark.parametrize("config", [AdamW.Config(), Adafactor.Config(), Lion.Config(), Muon.Config()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_exactly(config, dtype: torch.dtype) -> None:
    def updates(model: nn.Module, updater: Updater, first: int, last: int) -> None:
        for step in range(first, last):
            g = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
            updater.collect()
            updater.clip(1.0)
            updater.step(0.9**step)

    model = tiny().to(dtype)
    updater = Updater(model, config)
    updates(model, updater, 0, 3)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    state = {name: t.clone() for name, t in updater.state().items()}
    updates(model, updater, 3, 6)
    again = tiny(seed=5).to(dtype)
    other = Updater(again, config)
    other.load(again, weights, state)
    updates(again, other, 3, 6)
    assert same(model.state_dict(), again.state_dict()) and same(updater.state(), other.state())


def test_updates_below_bfloat16_resolution_do_not_vanish() -> None:
    """1000 steps of 1e-6 from 1.0: bfloat16 alone would stay at 1 (its spacing there is 2^-7)."""
    model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    updater = Updater(model, Lion.Config(lr=1e-5, weight_decay=0.0))
    for _ in range(1000):
        model.weight.grad = torch.ones_like(model.weight)
        updater.collect()
        updater.step(1.0)
    assert torch.allclose(updater.masters["weight"], torch.tensor(0.99), atol=1e-5)
    assert torch.equal(model.weight, torch.full_like(model.weight, 0.99))


def test_bfloat16_gradients_add_up_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    updater = Updater(model, AdamW.Config())
    for _ in range(512):
        model.weight.grad = torch.ones_like(model.weight)
        updater.collect()
    assert updater.clip(None).item() == 512.0  # in bfloat16 the sum stops at 256


def test_clip_is_torchs() -> None:
    a, b = tiny(), tiny()
    updater = Updater(a, AdamW.Config())
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    norm = updater.clip(0.5)
    assert norm == nn.utils.clip_grad_norm_(b.parameters(), 0.5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_state_of_another_optimiser_is_refused() -> None:
    model = tiny()
    lion, adamw = Updater(model, Lion.Config()), Updater(model, AdamW.Config())
    with pytest.raises(ValueError, match=r"lacks 'embed\.tokens\.weight\.step'"):
        adamw.load(model, model.state_dict(), lion.state())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW.Config(lr=-1.0), "AdamW.lr is -1.0"),
        (lambda: AdamW.Config(betas=(0.9, 1.0)), "AdamW.betas is"),
        (lambda: Lion.Config(weight_decay=-0.1), "Lion.weight_decay is -0.1"),
        (lambda: Muon.Config(iterations=0), "Muon.iterations is 0"),
        (lambda: Muon.Config(momentum=1.5), "Muon.momentum is 1.5"),
        (lambda: Updater(nn.Linear(2, 2).half(), AdamW.Config()), "float16"),
        (lambda: Updater(nn.Linear(2, 2).requires_grad_(False), AdamW.Config()), "no parameter"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

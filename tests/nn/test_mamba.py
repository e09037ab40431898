"""Mamba and Mamba-2 as mixers: sequences, states, training, their beginnings, and what configs refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from landmark.config import ModuleConfig, from_dict, to_dict
from landmark.ctx import Bounds, Ctx
from landmark.nn.mamba import Mamba, StepInit
from landmark.nn.mamba2 import Mamba2
from landmark.nn.norm import RMSNorm
from landmark.ops.scan import step
from tests.nn.mixers import check_learns, check_sequences, check_state_is_constant, small

MIXERS = {
    "mamba": Mamba.Config(),
    "mamba, few states": Mamba.Config(state=3, expand=3, conv=2, rank=5, conv_bias=False),
    "mamba, norms": Mamba.Config(norm=RMSNorm.Config(), bias=True),
    "mamba without a convolution": Mamba.Config(conv=1),
    "mamba-2": Mamba2.Config(heads=4, head_dim=16, state=32),
    "mamba-2, groups": Mamba2.Config(heads=6, head_dim=5, state=7, groups=3, chunk=4, conv=3, bias=True),
    "mamba-2, one long chunk": Mamba2.Config(heads=2, chunk=1000, state=16, most_step=0.5),
}


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_sequences(mixer: ModuleConfig) -> None:
    check_sequences(mixer)


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_the_state_does_not_grow(mixer: ModuleConfig) -> None:
    check_state_is_constant(mixer)


@pytest.mark.parametrize("name", ["mamba", "mamba-2"])
def test_it_learns_and_is_kept(name: str, tmp_path: Path) -> None:
    check_learns(MIXERS[name], tmp_path, steps=400)


def test_how_mamba_begins() -> None:
    torch.manual_seed(0)
    mixer = small(Mamba.Config(), dim=64).layers[0]["mixer"].fn
    assert isinstance(mixer, Mamba)
    torch.testing.assert_close(-mixer.A_log.exp(), -torch.arange(1.0, 17).expand(128, 16))
    steps = F.softplus(mixer.step.bias)
    assert 0.00099 <= steps.min() < 0.003 and 0.03 < steps.max() <= 0.1001 and (mixer.D == 1).all()
    assert mixer.step.weight.shape == (128, 4) and 0.4 < mixer.step.weight.abs().max() <= 0.5
    assert mixer.conv.weight.abs().max() <= 0.5


def test_how_mamba2_begins() -> None:
    torch.manual_seed(0)
    steps = StepInit(low=0.01, high=1.0, floor=0.1)
    mixer = small(Mamba2.Config(heads=200, head_dim=1, state=4, steps=steps), dim=64).layers[0]["mixer"].fn
    assert isinstance(mixer, Mamba2)
    A = mixer.A_log.exp()
    assert 1 <= A.min() < 2 and 14 < A.max() <= 16 and (mixer.D == 1).all()
    made = F.softplus(mixer.dt_bias)
    torch.testing.assert_close(made.min(), torch.tensor(0.1))
    assert 0.8 < made.max() <= 1.0001


def test_each_group_has_a_norm_of_its_own() -> None:
    """What one group says does not change the scale of another."""
    torch.manual_seed(0)
    mixer = Mamba2.Config(heads=4, head_dim=8, state=4, groups=2).build(16)
    mixer.reset_parameters()
    mixer.conv.reset_parameters()
    bounds = Bounds(1, 6)
    ctx, seen = Ctx(bounds.offsets(), bounds), []
    mixer.out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = torch.randn(1, 6, 16)
    mixer(x, ctx)
    with torch.no_grad():
        mixer.inner.weight[:16] *= 3  # the gate of the first group
    mixer(x, ctx)
    first, second = seen
    assert torch.equal(first[..., 16:], second[..., 16:]) and not torch.allclose(first[..., :16], second[..., :16])


@pytest.mark.parametrize("mixer", [MIXERS["mamba"], MIXERS["mamba-2"]], ids=["mamba", "mamba-2"])
def test_bfloat16_is_near(mixer: ModuleConfig) -> None:
    torch.manual_seed(0)
    model, tokens = small(mixer), torch.randint(0, 16, (2, 100))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        model.zero_grad()
        y = model(tokens)
        y.float().square().mean().backward()
        results.append([y.float(), *(p.grad.float() for p in model.parameters() if p.grad is not None)])
    for wide, half in zip(*results, strict=True):
        assert (wide - half).norm() < 0.1 * wide.norm()


def test_configs_as_data() -> None:
    for mixer in MIXERS.values():
        assert from_dict(to_dict(mixer)) == mixer


def test_what_configs_refuse() -> None:
    with pytest.raises(ValueError, match=r"Mamba2\.groups is 3, which does not divide heads 8"):
        Mamba2.Config(heads=8, groups=3)
    with pytest.raises(ValueError, match=r"Mamba2\.least_step is 1\.0 and most_step 0\.5"):
        Mamba2.Config(heads=8, least_step=1.0, most_step=0.5)
    with pytest.raises(ValueError, match=r"Mamba2\.chunk is 0"):
        Mamba2.Config(heads=8, chunk=0)
    with pytest.raises(ValueError, match=r"Mamba\.state is -1"):
        Mamba.Config(state=-1)
    with pytest.raises(ValueError, match="StepInit has low = 0"):
        StepInit(low=0)


@pytest.mark.skipif(step.SOURCE.why_not() is not None, reason=str(step.SOURCE.why_not()))
@pytest.mark.parametrize("name", ["mamba", "mamba, few states", "mamba, norms", "mamba without a convolution"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@torch.no_grad()
def test_a_decoded_token_in_one_call(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """The kernel, against the layer's own parts in float64; what it was given stays as it was."""
    torch.manual_seed(0)
    mixer = MIXERS[name].build(36)
    assert isinstance(mixer, Mamba)
    mixer.reset_parameters()
    mixer.step.reset_parameters()
    mixer.conv.reset_parameters()
    for tokens in (1, 3, 11):
        x = torch.randn(tokens, 1, 36)
        results = {}
        for kind in (dtype, torch.float64):
            mixer.to(dtype).to(kind)
            state = mixer.new_state(tokens, 9, kind, torch.device("cpu"))
            g = torch.Generator().manual_seed(1)
            given = {k: torch.randn(t.shape, generator=g).to(dtype).to(t.dtype) for k, t in state.tensors.items()}
            state.tensors = dict(given)
            before = {k: t.clone() for k, t in given.items()}
            ctx = Ctx(torch.zeros(tokens, 1, dtype=torch.long), Bounds(tokens, 1), (1,) * tokens)
            y = mixer(x.to(dtype).to(kind), ctx, state)
            assert all(torch.equal(t, before[k]) for k, t in given.items())
            results[kind] = [y, *state.tensors.values()]
        for got, want in zip(results[dtype], results[torch.float64], strict=True):
            assert got.shape == want.shape
            if want.numel():
                assert (got.double() - want).abs().max() <= tolerance * want.abs().max()

"""TTT layers: sequences, states, training, and what configs refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from landmark.config import ModuleConfig, from_dict, to_dict
from landmark.ctx import Bounds, Ctx
from landmark.nn.rope import Rope
from landmark.nn.ttt import TTTMLP, MambaBackbone, TTTLinear
from tests.nn.mixers import check_learns, check_sequences, check_state_is_constant

MIXERS = {
    "linear": TTTLinear.Config(heads=2, batch=4),
    "mlp": TTTMLP.Config(heads=2, batch=4),
    "linear, Mamba backbone": TTTLinear.Config(heads=2, batch=4, mamba=MambaBackbone()),
    "no rope, wide heads": TTTLinear.Config(heads=3, head_dim=8, batch=5, rope=None),
}


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_sequences(mixer: ModuleConfig) -> None:
    check_sequences(mixer)


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_the_state_does_not_grow(mixer: ModuleConfig) -> None:
    check_state_is_constant(mixer)


@pytest.mark.parametrize("name", ["linear", "mlp", "linear, Mamba backbone"])
def test_it_learns_and_is_kept(name: str, tmp_path: Path) -> None:
    check_learns(MIXERS[name], tmp_path)


def test_it_learns_while_it_reads() -> None:
    """The inner loss of a text that repeats itself falls as it is read: the weights at the end know it."""
    torch.manual_seed(0)
    layer = TTTLinear.Config(heads=2, batch=4, rate=8.0, rope=None).build(16)
    layer.reset_parameters()
    x = torch.randn(1, 4, 16).repeat(1, 16, 1)
    ctx = Ctx(Bounds(1, 64).offsets(), Bounds(1, 64), (0,))
    state = layer.new_state(1, 64, torch.float32, torch.device("cpu"))
    layer(x, ctx, state)
    k, v = (y[0, :4].detach().unflatten(-1, (2, 8)).transpose(0, 1) for y in (layer.k(x), layer.v(x)))

    def loss(w: torch.Tensor) -> float:
        return (k + torch.layer_norm(k @ w[:, :-1] + w[:, -1:], (8,)) - v).square().mean().item()

    assert loss(state.tensors["base0"][0]) < 0.7 * loss(layer.start()[0])


def test_configs_as_data() -> None:
    for mixer in MIXERS.values():
        assert from_dict(to_dict(mixer)) == mixer


def test_what_configs_refuse() -> None:
    with pytest.raises(ValueError, match=r"TTTLinear\.batch is 0"):
        TTTLinear.Config(heads=2, batch=0)
    with pytest.raises(ValueError, match=r"TTTMLP\.heads is 3, which does not divide the width 32"):
        TTTMLP.Config(heads=3).build(32)
    with pytest.raises(ValueError, match=r"TTTMLP\.rate is 0"):
        TTTMLP.Config(heads=2, rate=0.0)
    with pytest.raises(ValueError, match=r"MambaBackbone\.conv is 0"):
        MambaBackbone(conv=0)
    with pytest.raises(ValueError, match="rotary positions turn pairs"):
        TTTLinear.Config(heads=2, head_dim=3, rope=Rope.Config()).build(6)

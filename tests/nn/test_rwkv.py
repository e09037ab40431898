"""RWKV's mixers and channel mixes: isolation, decoding, constant memory, learning; values that cross layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from landmark.config import ModuleConfig
from landmark.models.decoder import Decoder
from landmark.models.pattern import pattern
from landmark.nn.channel_mix import RWKV4ChannelMix, RWKV6ChannelMix, RWKV7ChannelMix
from landmark.nn.rwkv4 import RWKV4
from landmark.nn.rwkv5 import RWKV5, RWKV6
from landmark.nn.rwkv7 import RWKV7
from landmark.objectives.lm import CausalLM
from landmark.train.blocks import transformed

from .mixers import TASK, check_learns, check_sequences, check_state_is_constant, small

MIXERS: dict[str, ModuleConfig] = {
    "4": RWKV4.Config(),
    "4, wider": RWKV4.Config(inner=48),
    "5": RWKV5.Config(head_dim=16),
    "6": RWKV6.Config(head_dim=16),
    "7": RWKV7.Config(head_dim=16),
    "7, odd": RWKV7.Config(head_dim=8, decay_rank=4, rate_rank=5, value_rank=6, gate_rank=7),
    "7, alone": RWKV7.Config(head_dim=16, value_residual=False),
    "channel 4": RWKV4ChannelMix.Config(),
    "channel 6": RWKV6ChannelMix.Config(hidden=56),
    "channel 7": RWKV7ChannelMix.Config(),
}


@pytest.mark.parametrize("name", MIXERS)
def test_sequences(name: str) -> None:
    check_sequences(MIXERS[name])


@pytest.mark.parametrize("name", MIXERS)
def test_state_is_constant(name: str) -> None:
    check_state_is_constant(MIXERS[name])


@pytest.mark.parametrize("name", ["4", "5", "6", "7"])
def test_learns(name: str, tmp_path: Path) -> None:
    check_learns(MIXERS[name], tmp_path, steps=160 if name == "4" else 60)  # averages recall slowly


def grads(model: Decoder) -> list[torch.Tensor]:
    loss = CausalLM().loss(model, TASK.batch(2, 0)).value
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_values_of_the_first_layer_reach_the_others() -> None:
    """Through recomputed blocks too, bit for bit; in the first layer they are its own, whatever its map says."""
    torch.manual_seed(0)
    model = small(RWKV7.Config(head_dim=16), layers=3).train()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    want = grads(model)
    with transformed(model, recompute=True, compile=False):
        again = grads(model)
    assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True))
    maps = [next(iter(layer.values())).fn.value for layer in model.layers]
    tokens = TASK.batch(2, 0).tokens
    model.eval()
    with torch.no_grad():
        before = model(tokens)
        maps[0].up.bias += 3
        assert torch.equal(model(tokens), before)
        maps[1].up.bias += 3
        assert not torch.allclose(model(tokens), before)


def test_deep_layers_begin_otherwise() -> None:
    model = small(RWKV7.Config(head_dim=16), layers=3)
    mixers = [next(iter(layer.values())).fn for layer in model.layers]
    assert mixers[0].decay.up.bias.mean() > mixers[2].decay.up.bias.mean()  # deep heads remember longer
    assert [round(m.norm.weight[0].item(), 3) for m in mixers] == [round((n / 3) ** 0.7, 3) for n in (1, 2, 3)]
    assert all(not m.out.weight.any() for m in mixers)


def test_in_patterns() -> None:
    """Beside attention and experts, with their own channel mix."""
    for text in ("rwkv4 + attention", "2*rwkv5", "rwkv6 + rwkv7/moe", "2*rwkv7"):
        model = pattern(text, dim=64, vocab=50).build().eval()
        tokens = torch.arange(20).view(1, 20)
        with torch.no_grad():
            state = model.new_state(1, 20)
            steps = [model(tokens[:, t : t + 1], state=state) for t in range(20)]
            torch.testing.assert_close(torch.cat(steps, 1), model(tokens), rtol=1e-4, atol=1e-5)
    names = {type(sub.fn).__name__ for sub in pattern("rwkv7", dim=64, vocab=50).build().layers[0].values()}
    assert names == {"RWKV7", "RWKV7ChannelMix"}


def test_bad_configs() -> None:
    with pytest.raises(ValueError, match=r"RWKV6\.head_dim is 64, which does not divide the width 96"):
        RWKV6.Config().build(96)
    with pytest.raises(ValueError, match="value_rank is given, but value_residual is False"):
        RWKV7.Config(value_residual=False, value_rank=8)
    with pytest.raises(ValueError, match=r"RWKV7\.decay_rank is 0"):
        RWKV7.Config(decay_rank=0)

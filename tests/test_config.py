from __future__ import annotations

import dataclasses

import pytest
import torch

from landmark.config import Config, flatten, from_dict, to_dict
from landmark.nn.attention import Attention, HeadNorm
from landmark.nn.embedding import Embedding, Head
from landmark.nn.feedforward import GLU, MLP
from landmark.nn.norm import LayerNorm, RMSNorm
from landmark.nn.residual import PreNorm, Repeat
from landmark.nn.rope import Rope
from landmark.nn.rope_scaling import YaRN

from landmark.models.decoder import Decoder  # isort: skip


def model(**changes: object) -> Decoder.Config:
    norm = RMSNorm.Config(eps=1e-5)
    rope = Rope.Config(theta=5e5, scaling=YaRN(factor=4.0, original=32))
    attn = Attention.Config(heads=4, kv_heads=2, head_dim=8, rope=rope, qk_norm=HeadNorm.Config(norm=norm))
    layer = {"attn": PreNorm.Config(fn=attn, norm=norm), "ffn": PreNorm.Config(fn=GLU.Config(hidden=40), norm=norm)}
    other = {"ffn": PreNorm.Config(fn=MLP.Config(hidden=24), norm=LayerNorm.Config())}
    layers = (layer, layer, other, Repeat.Config(layers=(layer,), times=3))
    values = {
        "dim": 16,
        "embed": Embedding.Config(vocab=50),
        "layers": layers,
        "norm": norm,
        "head": Head.Config(vocab=50),
    }
    return Decoder.Config(**{**values, **changes})


def test_a_tree_is_data() -> None:
    config = model()
    assert from_dict(to_dict(config)) == config
    leaves = flatten(config)
    assert leaves["layers.0-1.attn.fn.kv_heads"] == 2
    assert leaves["layers.2.ffn.fn"] == "MLP"
    assert leaves["layers.3.times"] == 3


def test_frozen_and_replaceable() -> None:
    config = model()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 3  # type: ignore[misc]
    assert dataclasses.replace(config, dim=32).dim == 32


def test_any_config_trains_and_decodes() -> None:
    """Mixed layers, one of them shared: full forward == step by step."""
    built = model().build().eval()
    tokens = torch.randint(0, 50, (2, 11))
    with torch.no_grad():
        full = built(tokens)
        state = built.new_state(2, 11)
        steps = torch.cat([built(tokens[:, t : t + 1], state=state) for t in range(11)], 1)
    assert (full - steps).abs().max() < 2e-5 * full.abs().max()
    shared = [n for n, _ in built.named_parameters() if n.startswith("layers.3")]
    assert len(shared) == len([n for n, _ in built.named_parameters() if n.startswith("layers.0")])


def test_unknown_names_say_the_nearest() -> None:
    data = to_dict(model())
    with pytest.raises(ValueError, match="no field 'dmi'; did you mean 'dim'"):
        from_dict({**data, "dmi": 3})
    with pytest.raises(ValueError, match="unknown config type 'RMSNrm'; did you mean 'RMSNorm'"):
        from_dict({"type": "RMSNrm"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GLU.Config(hidden=-3), "GLU.hidden is -3"),
        (lambda: GLU.Config(hidden=2.5), "GLU.hidden is 2.5"),
        (lambda: model(dim=0), "Decoder.dim is 0"),
        (lambda: Attention.Config(heads=4, kv_heads=3, head_dim=8), "kv_heads is 3, which does not divide heads 4"),
        (lambda: model(layers=()).build(), "at least one layer"),
        (lambda: model(dim=400_000_000).build(), r"does not fit this machine's .* GB; choose smaller sizes"),
        (lambda: Rope.Config(dim=3).build(8), "even part"),
        (lambda: RMSNorm.Config().build(10, groups=3), "no 3 equal groups"),
        (lambda: MLP.Config(hidden=4, act="gleu").build(4), "gleu"),
    ],
)
def test_bad_sizes(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_two_configs_cannot_share_a_name() -> None:
    with pytest.raises(TypeError, match="two configs are called RMSNorm"):

        class RMSNorm(Config):
            pass


def test_meta_builds_allocate_nothing() -> None:
    with torch.device("meta"):
        built = model().build()
    assert all(p.is_meta for p in built.parameters())

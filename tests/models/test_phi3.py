from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

import landmark
from landmark.models.decoder import Decoder
from landmark.nn.rope_scaling import LongRoPE
from landmark.weights.checkpoint import describe

from .encoders import check_sizes
from .families import check_decoder, close
from .layouts import old_rope

BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LONG = {"short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [2.0, 3.0, 5.0, 9.0], "rope_type": "longrope"}
PART = {"short_factor": [1.0, 1.1, 1.5], "long_factor": [2.0, 3.0, 5.0], "rope_type": "longrope"}
PART |= {"partial_rotary_factor": 0.75}
VARIANTS = {
    "plain": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "tied": {"tie_word_embeddings": True},
    "windowed": {"sliding_window": 7},
    "odd heads": {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 3},
    "part of a head": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "longrope, short text": {
        "rope_parameters": {**LONG, "rope_theta": 1e4}, "original_max_position_embeddings": 32,
    },
    "longrope on part of a head": {
        "rope_parameters": {**PART, "rope_theta": 1e4}, "original_max_position_embeddings": 32, "sliding_window": 9,
    },
}  # fmt: skip


def old(hf: dict) -> dict:
    """`rope_theta`, `rope_scaling` of type "su" and `partial_rotary_factor`, as the published files have them."""
    fraction = hf["rope_parameters"].pop("partial_rotary_factor", 1.0)
    hf["rope_parameters"].pop("original_max_position_embeddings", None)
    hf = old_rope(hf) | {"partial_rotary_factor": fraction}
    if hf["rope_scaling"]:
        hf["rope_scaling"]["type"] = "su"
    return hf


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("edit", [None, old])
def test_parity(name: str, edit: Callable[[dict], dict] | None, tmp_path: Path) -> None:
    check_decoder(Phi3Config(**{**BASE, **VARIANTS[name]}), Phi3ForCausalLM, tmp_path, edit=edit)


@pytest.mark.parametrize("values", [LONG, PART])
@pytest.mark.parametrize("edit", [None, old])
def test_texts_longer_than_the_original_context(
    values: dict, edit: Callable[[dict], dict] | None, tmp_path: Path
) -> None:
    """All keys are turned by the second set; a cached key keeps its first rotation, so decoding is apart."""
    config = Phi3Config(**BASE, rope_parameters={**values, "rope_theta": 1e4}, original_max_position_embeddings=16)
    model = check_decoder(config, Phi3ForCausalLM, tmp_path, edit=edit, decode=False)
    tokens = torch.arange(34).view(2, 17)
    short, longer = model(tokens[:, :16]), model(tokens)
    assert (short - longer[:, :16]).abs().max() > 1e-3
    both = model(tokens.view(1, 34), segments=torch.tensor([[0] * 17 + [1] * 16 + [2]]))
    close(both[:, :17], longer[:1])
    close(both[:, 17:33], short[1:])


COUNTS = {
    "phi3-mini-4k": 3_821_079_552, "phi3-mini-128k": 3_821_079_552, "phi3-medium-4k": 13_960_238_080,
    "phi3.5-mini": 3_821_079_552, "phi4": 14_659_507_200, "phi4-mini": 3_836_021_760,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_sizes(name: str) -> None:
    check_sizes(name, Phi3Config, Phi3ForCausalLM, COUNTS[name])


@pytest.mark.parametrize("name", ["phi3-mini-128k", "phi3.5-mini", "phi4-mini"])
def test_long_sizes_turn_as_the_reference(name: str) -> None:
    """The same frequencies and the same factor, up to 4096 tokens and beyond."""
    ours, hf = describe(name)
    assert isinstance(ours, Decoder.Config)
    rope = ours.layers[0]["attn"].fn.rope  # type: ignore[index]
    scaling, width = rope.scaling, rope.dim or 96
    assert isinstance(scaling, LongRoPE)
    small = {"num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8, "pad_token_id": 0}
    theirs = Phi3ForCausalLM(
        Phi3Config(**{k: v for k, v in hf.items() if k != "architectures"} | small)
    ).model.rotary_emb
    for length in (4096, 4097):
        theirs(torch.zeros(1), torch.tensor([[length - 1]]))
        frequencies = scaling.frequencies(rope.theta, width, torch.full((1, 1), length))
        torch.testing.assert_close(frequencies[0, 0], theirs.inv_freq, rtol=5e-7, atol=0)
    assert scaling.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "swoosh"}, "unknown activation 'swoosh'"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"embd_pdrop": 0.1}, "embd_pdrop = 0.1 is not supported"),
        ({"slidng_window": 8}, "did you mean 'sliding_window'"),
        ({"sliding_window": -8}, "Attention.window is -8"),
        ({"rope_scaling": {"type": "longrop", "factor": 4.0}}, "did you mean 'longrope'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4}}, "need the parameter 'long_factor'"),
        ({"rope_scaling": {**LONG, "short_mscale": 1.1}}, "'short_mscale' = 1.1 is not understood"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": None},
            "need the parameter 'original_max_position_embeddings'",
        ),
    ],
)
def test_bad_keys(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": ["Phi3ForCausalLM"], **BASE, **keys})


def test_too_few_longrope_divisors() -> None:
    values = {"rope_scaling": {**LONG, "short_factor": [1.0], "type": "longrope"}}
    model = landmark.build({"architectures": ["Phi3ForCausalLM"], **BASE, **values})
    with pytest.raises(ValueError, match="LongRoPE needs 4 factors of each kind, not 1 and 4"):
        model(torch.arange(4)[None])

"""Fewer key-value heads, more layers: new models from trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import landmark
from landmark.models.inspect import count, figures
from landmark.models.registry import published
from landmark.transforms.depth import upscale_depth
from landmark.transforms.uptrain import pool_heads

from ..models.families import close, perturb

BASE: dict[str, Any] = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=6)
BASE |= dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, head_dim=8)
BASE |= dict(sliding_window=7, tie_word_embeddings=True)
KINDS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"},
}
TOKENS = torch.arange(2 * 19).view(2, 19) * 7 % 61


def trained(kind: str, **keys: Any) -> Any:
    hf = {**BASE, **KINDS[kind], **keys}
    if kind == "llama":
        del hf["sliding_window"]
    if kind == "qwen2":
        del hf["head_dim"]
    model = landmark.build(hf)
    perturb(model)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_pooled_heads_are_the_mean_of_their_group(kind: str) -> None:
    model = trained(kind)
    new = pool_heads(model, 2)
    for old_layer, layer in zip(model.layers, new.layers, strict=True):
        old, made = old_layer["attn"].fn, layer["attn"].fn
        assert made.cfg.kv_heads == 2 and made.cfg.heads == 4
        for name in ("k", "v"):
            heads = getattr(old, name).weight.view(4, 8, 32)
            want = torch.stack([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2]).view(16, 32)
            assert torch.allclose(getattr(made, name).weight, want, atol=1e-7)
        assert torch.equal(old.q.weight, made.q.weight) and old.q.weight is not made.q.weight


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_pooling_equal_heads_changes_nothing(kind: str) -> None:
    model = trained(kind)
    for layer in model.layers:
        for projection in (layer["attn"].fn.k, layer["attn"].fn.v):
            for parameter in projection.parameters():
                heads = parameter.view(4, 8, -1)
                heads.copy_(heads[[0, 0, 2, 2]])
    before = model(TOKENS)
    close(pool_heads(model, 2)(TOKENS), before)
    close(pool_heads(model, 4)(TOKENS), before)
    assert model.layers[0]["attn"].fn.cfg.kv_heads == 4  # the old model is untouched


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_made_is_saved_in_the_familys_layout(kind: str, tmp_path: Path) -> None:
    for new in (pool_heads(trained(kind), 1), upscale_depth(trained(kind), 1)):
        landmark.save(new, tmp_path / "m")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager").eval()
        close(new(TOKENS), theirs(TOKENS, use_cache=False).logits)
        close(landmark.load(tmp_path / "m")(TOKENS), new(TOKENS))


@pytest.mark.parametrize(
    ("heads", "message"), [(3, "do not pool to 3"), (0, "do not pool to 0"), (8, "do not pool to 8")]
)
def test_heads_that_cannot_be_pooled(heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pool_heads(trained("llama"), heads)


def test_a_pooled_heads_published_size() -> None:
    family, hf = published("llama2-7b")
    with torch.device("meta"):
        model = family.read(hf).build()
    assert figures(pool_heads(model, 8), context=8).cache_per_token == 131_072


@torch.no_grad()
def test_the_middle_layers_come_twice() -> None:
    model = trained("llama")
    new = upscale_depth(model, 2)
    assert len(new.layers) == 8 and len(model.layers) == 6
    for made, index in zip(new.layers, [0, 1, 2, 3, 2, 3, 4, 5], strict=True):
        want = model.layers[index].state_dict()
        assert all(torch.equal(tensor, want[name]) for name, tensor in made.state_dict().items())
    x = model.embed(TOKENS, torch.arange(19).expand(2, 19))
    ctx = model.context(TOKENS)
    for index in [0, 1, 2, 3, 2, 3, 4, 5]:
        x = model.layers[index](x, ctx)
    close(new(TOKENS), model.logits(model.norm(x)))
    for p in new.layers[2].parameters():
        p.zero_()
    assert not torch.equal(
        new.layers[4]["ffn"].fn.up.weight, new.layers[2]["ffn"].fn.up.weight
    )  # copies, not one layer
    assert model.layers[2]["ffn"].fn.up.weight.abs().sum() > 0


def test_layers_keep_their_kind() -> None:
    """Windows go with their layers, though two of a kind meet at the seam."""
    new = upscale_depth(trained("gemma2"), 1)
    assert [layer["attn"].fn.cfg.window for layer in new.layers] == [7, None, 7, None, 7, None, 7, None, 7, None]
    assert new.origin is not None and "layer_types" not in new.origin.hf
    new = upscale_depth(trained("gemma2"), 2)  # 0 1 2 3 | 2 3 4 5
    assert new.origin is not None and "layer_types" not in new.origin.hf
    new = upscale_depth(trained("gemma3"), 1)
    assert [layer["attn"].fn.cfg.window for layer in new.layers] == [7] * 9 + [None]
    assert new.origin is not None and new.origin.hf["layer_types"][5] == "sliding_attention"


def test_solars_size() -> None:
    family, hf = published("mistral-7b-v0.1")
    with torch.device("meta"):
        model = family.read(hf).build()
    assert count(upscale_depth(model, 8)) == 10_731_524_096


@pytest.mark.parametrize("drop", [-1, 3, 6])
def test_drops_that_make_nothing_deeper(drop: int) -> None:
    with pytest.raises(ValueError, match="choose 0 to 2"):
        upscale_depth(trained("llama"), drop)


def test_only_one_stack_can_grow() -> None:
    family, hf = published("transformer-base")
    with torch.device("meta"):
        model = family.read(hf).build()
    with pytest.raises(ValueError, match="no single stack"):
        upscale_depth(model, 1)


@torch.no_grad()
def test_what_no_family_can_say_is_saved_as_our_own(tmp_path: Path) -> None:
    hf = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 61, "n_embd": 32, "n_head": 4, "n_layer": 3}
    model = landmark.build({**hf, "n_positions": 64})
    perturb(model)
    new = pool_heads(model.eval(), 2)
    landmark.save(new, tmp_path)
    again = landmark.load(tmp_path)
    assert again.layers[0]["attn"].fn.cfg.kv_heads == 2  # type: ignore[index]
    close(again(TOKENS), new(TOKENS))
    assert upscale_depth(model, 1).origin.hf["n_layer"] == 4  # type: ignore[union-attr]

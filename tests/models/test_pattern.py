"""Patterns: what parses and what does not, and a tiny model of every part and of mixtures that trains, decodes, is
saved and loaded, and keeps packed documents apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import landmark
from landmark.cli.main import app
from landmark.config import from_dict, to_dict
from landmark.models.decoder import Decoder
from landmark.models.inspect import figures
from landmark.models.pattern import FFNS, MIXERS, Pattern, parse, pattern
from landmark.nn.attention import Attention
from landmark.nn.bitlinear import BitLinear
from landmark.transforms.bitnet import bitnet, pack_ternary
from landmark.weights.checkpoint import describe

from .families import check_decoding, check_packing

TOKENS = torch.arange(2 * 23).view(2, 23) * 7 % 61
SMALL: dict[str, Any] = {
    "peer": {"experts": 64, "heads": 2, "active": 4, "key_dim": 16},
    "window": {"window": 7},
    "memory": {"chunk": 4},
    "titans": {"segment": 8, "memory": {"chunk": 4}, "persistent": 3},
    "titans-mac": {"segment": 8, "memory": {"chunk": 4, "depth": 1}, "attention": {"kv_heads": 4}},
    "titans-mag": {"attention": {"window": 5}, "memory": {"chunk": 4}},
    "titans-mal": {"attention": {"window": 5, "tokens": 2}, "memory": {"chunk": 4}},
}
PATTERNS = [
    *MIXERS,
    *(f"attention/{ffn}" for ffn in FFNS if ffn not in ("glu",)),
    "2*(2*window + attention)/moe",
    "ttt/peer + window/none + attention",
    "3*window + titans",
    "3*mamba2 + attention",
    "(mamba + latent)/moe",
    "attention + 2*rwkv7/moe + rwkv7",
]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("a", "a"),
        ("2*a + 1*b", "a a b"),
        ("2*(a+2*b)", "a b b a b b"),
        ("3*(2*(a + b/x) + c)/y", "a/y b/x a/y b/x c/y " * 3),
        (" a /x+b-c.1/none ", "a/x b-c.1/none"),
        ("((a))", "a"),
    ],
)
def test_what_parses(text: str, layers: str) -> None:
    assert [mixer if ffn is None else f"{mixer}/{ffn}" for mixer, ffn in parse(text)] == layers.split()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a mixer, a count or '(' should stand where the end is"),
        ("3*", "should stand where the end is"),
        ("2 a", "'*' should stand where 'a' at character 3 is"),
        ("0*a", "a count of at least 1 should stand where '0' at character 1"),
        ("a + -2*b", "a count of at least 1 should stand where '-2' at character 5"),
        ("2.5*a", "'*' should stand where '.' at character 2"),
        ("2*(a + b", "'+' or ')' should stand where the end is"),
        ("a + b)", "'+' or the end should stand where ')' at character 6"),
        ("a ++ b", "should stand where '+' at character 4"),
        ("a/2", "a feed-forward should stand where '2' at character 3"),
        ("a & b", "should stand where '&' at character 3"),
        ("100*(101*a)", "more than 10,000 layers"),
    ],
)
def test_what_does_not_parse(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(text)
    assert message in str(error.value) and repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("atention", {}, "there is no mixer 'atention'; did you mean 'attention'?"),
        ("attention/mo", {}, "there is no feed-forward 'mo'; did you mean 'moe'?"),
        ("attention/window", {}, "there is no feed-forward 'window'"),
        ("window", {"dim": 100}, "the part 'window' of the pattern: a width of 100"),
        ("window", {"parts": {"windw": {}}}, "has no part 'windw'; did you mean 'window'?"),
        ("window", {"parts": {"window": {"windows": 3}}}, "Attention has no field 'windows'; did you mean 'window'?"),
        ("window", {"parts": {"window": 3}}, "the part 'window' of the pattern is 3; it must be a table"),
        ("window", {"parts": {"window": {"window": 0}}}, "the part 'window' of the pattern: Attention.window is 0"),
        ("a", {"parts": {"a": {"like": "atention"}}}, "there is no mixer 'atention'"),
        ("a", {"parts": {"a": {"type": "Atention"}}}, "unknown config type 'Atention'; did you mean 'Attention'?"),
        ("attention/moe", {"parts": {"moe": {"active": 9}}}, "the part 'moe' of the pattern: MoE.active is 9"),
        ("attention/peer", {"parts": {"peer": {"experts": 50}}}, "PEER.experts is 50, which is no square"),
        ("attention", {"dim": 0}, "Pattern.dim is 0"),
        ("attention", {"parts": 3}, "Pattern.parts is 3"),
        (3, {}, "a pattern is a text such as"),
    ],
)
def test_what_makes_no_model(text: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Pattern(pattern=text, **{"dim": 64, "vocab_size": 61, **fields})
    assert message in str(error.value)


def test_a_table_without_a_pattern() -> None:
    with pytest.raises(ValueError, match="Pattern needs the field 'pattern'"):
        from_dict({"type": "Pattern", "dim": 64})
    with pytest.raises(ValueError, match="Pattern has no field 'patern'; did you mean 'pattern'"):
        from_dict({"type": "Pattern", "patern": "attention"})


def test_parts() -> None:
    """Changed fields, another of a kind, a whole config, in Python and as data; equal layers share one config."""
    wide = Attention.Config(heads=2, kv_heads=1, head_dim=32)
    parts = {"near": {"like": "window", "window": 5}, "far": {"like": "window", "window": 9}, "wide": wide}
    made = pattern("near + far/mlp + wide + wide/moe + attention/none", dim=64, vocab=61, parts=parts)
    mixers = [layer["mixer"].fn for layer in made.layers]
    assert [m.window for m in mixers] == [5, 9, None, None, None] and mixers[2] is wide
    assert [type(layer["ffn"].fn).__qualname__ if "ffn" in layer else "" for layer in made.layers] == [
        "GLU.Config", "MLP.Config", "", "MoE.Config", "",
    ]  # fmt: skip
    tables = {**parts, "wide": {"type": "Attention", "heads": 2, "kv_heads": 1, "head_dim": 32}}
    text = "near + far/mlp + wide + wide/moe + attention/none"
    as_data = json.loads(json.dumps({"type": "Pattern", "pattern": text, "dim": 64, "vocab_size": 61, "parts": tables}))
    assert from_dict(as_data).config() == made
    assert from_dict(json.loads(json.dumps(to_dict(made)))) == made


def made(text: str) -> Decoder:
    torch.manual_seed(0)
    parts = {name: table for name, table in SMALL.items() if any(name in pair for pair in parse(text))}
    model = pattern(text, dim=32, vocab=61, parts=parts).build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model


@pytest.mark.parametrize("text", PATTERNS)
def test_trains_decodes_and_is_saved(text: str, tmp_path: Path) -> None:
    model = made(text).train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(4):
        hidden = model.hidden(TOKENS[:, :-1])
        loss = model.loss(hidden, TOKENS[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        full = model(TOKENS)
        check_packing(model, TOKENS)
        check_decoding(model, TOKENS, full)
        landmark.save(model, tmp_path)
        back = landmark.load(tmp_path)
        assert back.cfg == model.cfg and torch.equal(back(TOKENS), full)
    costs = figures(model, context=64)
    assert 0 < costs.active <= costs.parameters and costs.cache is not None


@pytest.mark.parametrize("text", [*MIXERS, "attention/peer", "attention/moe"])
@torch.no_grad()
def test_ternary_decodes_and_packs(text: str) -> None:
    """No mixer passes by what stands for its linear maps."""
    model = bitnet(made(text).eval())
    full, state = model(TOKENS[:1]), model.new_state(1, 23)
    steps = [model(TOKENS[:1, :9], state=state)] + [model(TOKENS[:1, t : t + 1], state=state) for t in range(9, 23)]
    # a number that lies halfway between two of 8 bits may be rounded either way
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=0.02 * full.abs().max().item())
    torch.testing.assert_close(pack_ternary(model)(TOKENS[:1]), full)


def test_ternary() -> None:
    model = Pattern(pattern="window + attention/moe", dim=64, vocab_size=61, linear=BitLinear.Config()).build()
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds["layers.0.mixer.fn.q"] is BitLinear and kinds["layers.1.ffn.fn.router.linear"] is not BitLinear


def test_described_by_its_text_and_by_a_runs_file(tmp_path: Path) -> None:
    config, hf = describe("2*window + attention")
    assert isinstance(config, Decoder.Config) and len(config.layers) == 3 and hf["model_type"] == "landmark"
    path = tmp_path / "run.toml"
    path.write_text('[model]\ntype = "Pattern"\npattern = "attention"\ndim = 64\n[tokenizer]\nvocab_size = 77\n')
    config, _ = describe(path)
    assert isinstance(config, Decoder.Config) and config.embed.vocab == 77 and config.dim == 64
    path.write_text("steps = 3\n")
    with pytest.raises(ValueError, match=r"has no \[model\]"):
        describe(path)
    shown = CliRunner().invoke(app, ["inspect", "window + attention/moe", "--json"])
    assert shown.exit_code == 0 and json.loads(shown.stdout)["models"][0]["layers"] == 2

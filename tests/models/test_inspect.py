"""Figures against torch's own counter and published numbers; diffs that say what the papers changed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import landmark
from landmark.cli.main import main
from landmark.config import ModuleConfig
from landmark.models.diff import Pattern, diff, leaves
from landmark.models.encoder_decoder import EncoderDecoder
from landmark.models.inspect import Figures, figures, forward_flops, training_flops
from landmark.models.registry import published, sizes
from landmark.nn.attention import Attention
from landmark.nn.linear import Linear
from landmark.nn.mtp import IndependentDrafts

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
TINY |= dict(num_key_value_heads=2, max_position_embeddings=64)
LAYOUTS: dict[str, dict[str, Any]] = {
    "gqa": {"architectures": ["LlamaForCausalLM"]},
    "tied": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "soft caps": {"architectures": ["Gemma2ForCausalLM"], "head_dim": 16, "sliding_window": 20},
    "qk norm": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 6},
}


def meta(spec: str | dict[str, Any]) -> Any:
    with torch.device("meta"):
        if isinstance(spec, dict):
            return landmark.build(spec)
        family, hf = published(spec)
        return family.read(hf).build()


@pytest.mark.parametrize("name", LAYOUTS)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    model, length = meta({**TINY, **LAYOUTS[name]}), 13
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(2, length, dtype=torch.long, device="meta"))
    assert counter.get_total_flops() == 2 * length * forward_flops(model, length)


def test_flops_of_shared_layers_and_of_two_sides() -> None:
    tokens = torch.zeros(1, 11, dtype=torch.long, device="meta")
    albert = meta("albert-base-v2")
    with FlopCounterMode(display=False) as counter:
        albert(tokens)
    assert counter.get_total_flops() == 11 * forward_flops(albert, 11)
    pair = meta("transformer-base")
    assert isinstance(pair, EncoderDecoder)
    with FlopCounterMode(display=False) as counter:
        pair(tokens, tokens)
    assert counter.get_total_flops() == 11 * forward_flops(pair, 11)


def test_training_counts_what_each_token_of_a_text_sees() -> None:
    """In causal layers what is before it, in others all; the mean over the text, forward and twice that backward."""
    for spec in ("gpt2", "gemma3-270m"):  # a window shorter than the text
        model, length = meta(spec), 64
        for attention in model.modules():
            if isinstance(attention, Attention) and attention.cfg.window is not None:
                attention.cfg = replace(attention.cfg, window=9)
        exact = 3 * sum(forward_flops(model, seen) for seen in range(1, length + 1)) / length
        assert training_flops(model, length) == pytest.approx(exact, rel=1e-9)
    long = figures(meta("llama2-7b"), context=4096)
    half = 3 * forward_flops(meta("llama2-7b"), 2048)
    assert long.training_flops == pytest.approx(half, rel=1e-4) and long.training_flops < 3 * long.flops
    for name in ("bert-base-uncased", "deberta-v3-small"):
        assert figures(meta(name), context=100).training_flops == 3 * figures(meta(name), context=100).flops


def test_training_passes_drafts_and_their_heads() -> None:
    plain = meta({**TINY, **LAYOUTS["gqa"]})
    layer = plain.cfg.layers[0]
    with torch.device("meta"):
        model = replace(plain.cfg, drafts=IndependentDrafts.Config(layer=layer, depth=2)).build()
    assert forward_flops(model, 10) == forward_flops(plain, 10)
    one = training_flops(plain, 10)
    head = 3 * 2 * plain.cfg.dim * plain.cfg.embed.vocab
    body = one - head
    assert training_flops(model, 10) == one + 2 * (head + body // len(plain.cfg.layers))


def test_windows_bound_what_a_token_costs() -> None:
    mistral = meta("mistral-7b-v0.1")
    assert forward_flops(mistral, 4096) == forward_flops(mistral, 32768) > forward_flops(mistral, 4095)
    made = figures(mistral)
    assert made.context == made.longest == 32768
    assert (made.cache_per_token, made.cache_growth, made.cache) == (131_072, 0, 4096 * 131_072)


def test_local_and_global_layers_keep_different_pasts() -> None:
    made = figures(meta("gemma3-1b"), context=10_000)
    per_layer = 2 * 256 * 2  # keys and values of one head, bfloat16
    assert made.cache_per_token == 26 * per_layer and made.cache_growth == 4 * per_layer
    assert made.cache == (22 * 512 + 4 * 10_000) * per_layer


def test_number_formats() -> None:
    made = figures(meta("llama3.1-8b"), context=10, dtype=torch.float32)
    assert made.cache == 10 * 262_144
    assert made.memory == {
        "float32": 32_121_044_992, "bfloat16": 16_060_522_496, "int8": 8_030_261_248, "int4": 4_015_130_624,
    }  # fmt: skip


def test_an_encoder_decodes_nothing_and_two_sides_keep_the_source() -> None:
    assert figures(meta("bert-base-uncased")).cache is None
    made = figures(meta("transformer-base"), context=7)
    assert made.layers == 12 and made.cache_per_token == 6 * 2 * 2 * 512 * 2 and made.cache == 7 * made.cache_per_token


def test_figures_need_no_meta_device_and_leave_the_model_alone() -> None:
    model = landmark.build({**TINY, **LAYOUTS["gqa"]})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert figures(model, context=9) == figures(meta({**TINY, **LAYOUTS["gqa"]}), context=9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class OneOfFour(nn.Module):
    """Stands for a mixture of experts: of four matrices a token passes one."""

    class Config(ModuleConfig):
        def build(self, dim: int) -> OneOfFour:
            return OneOfFour(dim)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Linear(dim, dim, bias=False) for _ in range(4))

    def active_parameters(self) -> int:
        return self.experts[0].weight.numel()

    def forward(self, x: Tensor, ctx: Any = None, state: Any = None) -> Tensor:
        return self.experts[0](x)


def test_experts_count_as_they_are_passed() -> None:
    from dataclasses import replace

    dense = meta({**TINY, **LAYOUTS["gqa"]})
    layer = {**dense.cfg.layers[0], "ffn": replace(dense.cfg.layers[0]["ffn"], fn=OneOfFour.Config())}
    config = replace(dense.cfg, layers=(layer, *dense.cfg.layers[1:]))
    with torch.device("meta"):
        made, plain = figures(config.build(), context=5), figures(dense, context=5)
    assert made.parameters - made.active == 3 * 32 * 32 and plain.active == plain.parameters
    assert made.flops == plain.flops + 2 * (32 * 32 - 3 * 32 * 48)


def test_a_context_of_nothing() -> None:
    with pytest.raises(ValueError, match="a context of 0 tokens"):
        figures(meta({**TINY, **LAYOUTS["gqa"]}), context=0)


def steps(*names: str) -> list[dict[str, tuple[Any, Any]]]:
    configs = [family.read(hf) for family, hf in map(published, names)]
    return [{change.path: (change.before, change.after) for change in diff(a, b)} for a, b in pairwise(configs)]


def test_the_family_history_says_what_the_papers_changed() -> None:
    names = ("gpt2", "llama2-7b", "llama3-8b", "llama3.1-8b", "llama3.2-1b")
    llama2, llama3, llama31, llama32 = steps(*names)
    assert llama2["embed.positions"] == ("LearnedPositions", None)
    assert llama2["layers.attn.fn.rope"] == (None, "Rope")
    for place in ("norm", "layers.attn.norm", "layers.ffn.norm"):
        assert llama2[place] == ("LayerNorm", "RMSNorm")
    assert llama2["layers.ffn.fn"] == ("MLP", "GLU")
    assert llama2["layers.ffn.fn.act"] == ("gelu_tanh", "silu")
    assert llama2["layers.attn.fn.bias"] == (True, False)
    assert llama2["head.tied"] == (True, False)
    assert llama2["layers"] == (12, 32)
    assert "embed.positions.size" not in llama2 and "layers.attn" not in llama2
    assert llama3 == {
        "embed.vocab": (32000, 128256),
        "layers.attn.fn.kv_heads": (32, 8),
        "layers.attn.fn.rope.theta": (1e4, 5e5),
        "layers.ffn.fn.hidden": (11008, 14336),
        "context": (4096, 8192),
        "head.vocab": (32000, 128256),
    }
    assert llama31 == {
        "layers.attn.fn.rope.scaling": (None, "Llama3Rope"),
        "layers.attn.fn.rope.scaling.factor": (None, 8.0),
        "layers.attn.fn.rope.scaling.low": (None, 1.0),
        "layers.attn.fn.rope.scaling.high": (None, 4.0),
        "layers.attn.fn.rope.scaling.original": (None, 8192),
        "context": (8192, 131072),
    }
    assert llama32["layers.attn.fn.rope.scaling.factor"] == (8.0, 32.0)
    assert llama32["head.tied"] == (False, True)


def test_a_model_does_not_differ_from_itself() -> None:
    for name in sizes():
        assert steps(name, name) == [{}]


def test_layers_that_differ_show_their_pattern() -> None:
    (gemma,) = steps("gemma2-9b", "gemma3-12b")
    before, after = gemma["layers.attn.fn.window"]
    assert before == Pattern(((4096, 1), (None, 1)), periodic=True)
    assert after == Pattern(((1024, 5), (None, 1)), periodic=True)
    assert str(after) == "(1,024 x5, none) ..."
    uneven = meta({**TINY, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 3})
    window = leaves(uneven.cfg)["layers.attn.fn.window"]
    assert window == Pattern(((None, 3), (4096, 1)), periodic=False) and str(window) == "none x3, 4,096"


def test_shared_layers_are_compared_with_those_that_are_not() -> None:
    (albert,) = steps("bert-base-uncased", "albert-base-v2")
    assert albert["layers.shared"] == (None, 12) and "layers" not in albert and "layers.attn.fn.heads" not in albert
    assert albert["embed.width"] == (None, 128)


def command(*words: str) -> int:
    """The exit code of `landmark inspect ...`."""
    old, sys.argv = sys.argv, ["landmark", "inspect", *words]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = old
    return 0


def test_command_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **LAYOUTS["gqa"]}))
    assert command(str(tmp_path), "llama3.1-405b", "--json", "--context", "1000", "--dtype", "fp32") == 0
    said = json.loads(capsys.readouterr().out)
    tiny, large = said["models"]
    assert large["model"] == "llama3.1-405b" and large["cache"] == 2 * 516_096_000 and large["context"] == 1000
    assert tiny["model"] == str(tmp_path) and set(tiny) == {"model", *Figures.__dataclass_fields__}
    (step,) = said["diffs"]
    assert {"path": "dim", "before": 32, "after": 16384} in step["changes"]
    assert command(str(tmp_path / "config.json"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["parameters"] == tiny["parameters"]


def test_command_in_print(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("llama3.1-405b") == 0
    out = capsys.readouterr().out
    assert "405,853,388,800" in out and "516,096 B" in out and "756 GiB" in out
    assert command("llama2-7b", "llama3-8b", "llama3.1-8b", "--diff") == 0
    out = capsys.readouterr().out
    assert "llama2-7b -> llama3-8b" in out and "llama3-8b -> llama3.1-8b" in out and "Llama3Rope" in out
    assert command() == 0
    out = capsys.readouterr().out
    assert all(name in out for name in sizes())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama3.1-405"], "did you mean 'llama3.1-405b'?"),
        (["llama2-7b", "--context", "0"], "a context of 0 tokens"),
        (["llama2-7b", "--dtype", "bf61"], "unknown dtype 'bf61'"),
        (["llama2-7b", "--diff"], "name at least two"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(tmp_path)) == 2
    assert "config.json" in capsys.readouterr().err

"""`landmark transform`: the directory that it writes, and what it says of input that cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import landmark
from landmark.cli.main import app

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 61, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = torch.arange(12)[None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    landmark.save(landmark.build(LLAMA), tmp_path / "model")
    return tmp_path / "model"


def transform(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["transform", *map(str, arguments)])


def test_fewer_heads(model: Path, tmp_path: Path) -> None:
    """The new keys are the means of pairs of the old ones, and config.json says how many there are."""
    done = transform(model, tmp_path / "out", "--kv-heads", 2, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    old, new = landmark.load(model), landmark.load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 2
    keys = old.state_dict()["layers.0.attn.fn.k.weight"].view(2, 2, 8, 32).mean(1).flatten(0, 1)
    torch.testing.assert_close(new.state_dict()["layers.0.attn.fn.k.weight"], keys)
    counts = [sum(p.numel() for p in m.parameters()) for m in (old, new)]
    assert report["parameters"] == {"from": counts[0], "to": counts[1]} and report["layers"] == {"from": 4, "to": 4}


def test_deeper(model: Path, tmp_path: Path) -> None:
    done = transform(model, tmp_path / "out", "--drop-layers", 1)
    assert done.exit_code == 0 and "layers: 4 -> 6" in done.stdout
    old, new = landmark.load(model).state_dict(), landmark.load(tmp_path / "out").state_dict()
    for index, origin in enumerate((0, 1, 2, 1, 2, 3)):
        name = "attn.fn.q.weight"
        assert torch.equal(new[f"layers.{index}.{name}"], old[f"layers.{origin}.{name}"])


def test_quantised_files(model: Path, tmp_path: Path) -> None:
    """The directory is smaller, and its logits are those of weights rounded as they are loaded."""
    from landmark.transforms.quantise import quantised

    done = transform(model, tmp_path / "out", "--quantise", "int4-all")
    assert done.exit_code == 0, done.output
    new = landmark.load(tmp_path / "out")
    assert torch.equal(new(TOKENS), quantised(landmark.load(model), "int4-all")(TOKENS))
    sizes = [(directory / "model.safetensors").stat().st_size for directory in (model, tmp_path / "out")]
    assert sizes[1] < 0.6 * sizes[0]  # rows of 32 are padded to 128
    done = transform(model, tmp_path / "other", "--quantise", "int3")
    assert done.exit_code != 0 and not (tmp_path / "other").exists()


def test_both_at_once(model: Path, tmp_path: Path) -> None:
    done = transform(model, tmp_path / "out", "--kv-heads", 1, "--drop-layers", 1, "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    new = landmark.load(tmp_path / "out")
    assert len(new.cfg.layers) == 6 and new.dtype == torch.bfloat16 and new(TOKENS).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is nothing to transform; give --kv-heads N, --drop-layers N, --rope"),
        (("--kv-heads", 3), "has 4 key-value heads, which do not pool to 3; choose a divisor"),
        (("--kv-heads", 0), "do not pool to 0"),
        (("--drop-layers", 2), "dropping 2 of 4 layers twice makes no deeper model; choose 0 to 1"),
        (("--drop-layers", -1), "dropping -1 of 4 layers"),
        (("--rope", "yarn"), "--rope yarn needs --factor"),
        (("--rope", "abf", "--theta", -1), "the rotary base (theta) is -1.0"),
        (("--kv-heads", 2, "--factor", 2), "--factor goes with --rope"),
    ],
)
def test_what_cannot_work(model: Path, tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    done = transform(model, tmp_path / "out", *arguments)
    assert isinstance(done.exception, ValueError) and message in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_directories(model: Path, tmp_path: Path) -> None:
    full = transform(model, model, "--kv-heads", 2)
    assert isinstance(full.exception, ValueError) and "exists already" in str(full.exception)
    absent = transform(tmp_path / "none", tmp_path / "out", "--kv-heads", 2)
    assert isinstance(absent.exception, ValueError) and "no directory" in str(absent.exception)


def test_ternary(model: Path, tmp_path: Path) -> None:
    """Made ternary, then packed: the same numbers, and config.json in transformers' words."""
    assert transform(model, tmp_path / "made", "--bitnet").exit_code == 0
    assert transform(tmp_path / "made", tmp_path / "packed", "--pack").exit_code == 0
    assert transform(model, tmp_path / "both", "--bitnet", "--pack").exit_code == 0
    want = landmark.load(tmp_path / "made")(TOKENS)
    for name in ("packed", "both"):
        said = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert said == {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
        assert torch.equal(landmark.load(tmp_path / name)(TOKENS), want)
    done = transform(model, tmp_path / "no", "--pack")
    assert done.exit_code != 0 and "no ternary linear maps" in str(done.exception)

"""The main job on a small text: everything that it promises stands in one directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import landmark
from landmark.cli.main import app
from landmark.quickstart import recipe, run
from landmark.train.recipe import SMALL
from landmark.weights.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    from pydoc_data.topics import topics

    root = tmp_path_factory.mktemp("quickstart")
    text = root / "text"
    text.mkdir()
    for name in sorted(topics)[:60]:
        (text / f"{name}.txt").write_text(topics[name])
    config = recipe(root / "out", 60, str(text))
    model = {**SMALL, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    small = dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, rows=8, length=64))
    return root / "out", dataclasses.asdict(run(small))


def test_report(done: tuple[Path, dict]) -> None:
    out, report = done
    assert report == json.loads((out / "report.json").read_text())
    assert report["bits_per_byte"] < report["bits_per_byte_before"] - 0.2
    assert all(1 < value < 5 for value in report["baselines"].values())
    assert len(report["before"]) == len(report["after"]) == 3 and report["before"] != report["after"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_transformers_loads_the_model_and_its_tokenizer(done: tuple[Path, dict]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = done
    text = "The with statement: x = [1, 2]\n"
    ids = Tokenizer.load(out).encode(text)
    assert AutoTokenizer.from_pretrained(out)(text, add_special_tokens=False)["input_ids"] == ids
    ours = landmark.load(out, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        a, b = ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits
    assert (a - b).abs().max() < 2e-5 * b.abs().max()


def test_a_run_is_not_overwritten(done: tuple[Path, dict]) -> None:
    out, _ = done
    with pytest.raises(ValueError, match="holds a run already"):
        CliRunner().invoke(app, ["quickstart", "--out", str(out), "--steps", "12"], catch_exceptions=False)

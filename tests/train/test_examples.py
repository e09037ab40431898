"""The recipes in examples/: each trains from its file, stops, goes on to the same bits, and is saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import landmark
from landmark.train import Callback, Run, TrainConfig, train
from landmark.train.read import override, parse, read_toml

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL,
    "albert": SMALL | {"embedding_size": 16},
    "llama": SMALL,
    "mtp": SMALL,
    "hybrid": {"dim": 32, "parts.window.window": 9, "parts.moe.experts": 4},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64},
    "transformer": {"d_model": 32} | {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (
        ("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))},
}  # fmt: skip
METRICS = {
    "bert": "pair_accuracy", "roberta": "accuracy", "albert": "pair_accuracy", "llama": "bits_per_byte",
    "gpt2": "bits_per_byte", "transformer": "bits_per_byte", "classify": "accuracy", "choose": "accuracy",
    "hybrid": "bits_per_byte", "mtp": "draft_1",
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name in "ab":
        lines = [f"Line {i} of {name}: the {i % 7} of them said {i * i} and went. So it was, {i}." for i in range(200)]
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    pairs = [{"source": f"red {i} green {i % 9}", "target": f"{i % 9} green {i} red"} for i in range(300)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rows = [{"text": f"It was a {('bad', 'good')[i % 2]} film, {i}.", "label": ("no", "yes")[i % 2]} for i in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"context": f"Day {i} was", "choices": ["hot.", "a fish."], "answer": "hot."} for i in range(80)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(question) + "\n" for question in asked))
    return folder


def tiny(name: str, texts: Path, out: Path) -> list[str]:
    """What makes a recipe small: all else is as its file says."""
    corpora = {
        "transformer": [f"data.corpus={texts / 'pairs.jsonl'}", "data.text=source", "data.target=target"],
        "classify": [f"data.corpus={texts / 'rows.jsonl'}"],
        "choose": [f"data.corpus={texts / 'asked.jsonl'}"],
    }
    return [
        f"out={out}", "steps=3", "peak_flops=1e12", "schedule.warmup=1", "tokenizer.vocab_size=400", "data.rows=4",
        "data.length=32", "data.held_out=0.2", "evaluation.batches=2", "evaluation.tokens=4", "checkpoints.every=1",
        *(f"model.{key}={value}" for key, value in TINY.get(name, {}).items()),
        *corpora.get(name, [f"data.corpus={texts}/*.txt"]),
    ]  # fmt: skip


class Stopped(Exception):
    pass


class Stop(Callback):
    """As if the process were killed after the first checkpoint."""

    def saved(self, run: Run, directory: Path) -> None:
        raise Stopped


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path, texts: Path, tmp_path: Path) -> None:
    def read(name: str, path: Path = path) -> TrainConfig:
        return parse(TrainConfig, override(read_toml(path), [*tiny(path.stem, texts, tmp_path / name), *more]))

    more: list[str] = []
    if path.stem in ("classify", "choose"):
        train(read("bert", path.with_name("bert.toml")))
        more = [f"model={tmp_path / 'bert'}"]
    run = train(read("whole"))
    assert run.evaluated is not None and METRICS[path.stem] in run.evaluated[1]
    assert all(map(torch.isfinite, map(torch.tensor, run.evaluated[1].values())))
    loaded = landmark.load(tmp_path / "whole")
    assert loaded.cfg == run.model.cfg and loaded.origin is not None
    native = path.stem in ("hybrid", "mtp")  # the others have a class that other libraries know
    assert (loaded.origin.hf["architectures"][0] == "LandmarkModel") == native
    more.append(f"tokenizer.path={tmp_path / 'whole'}")  # Unigram's trainer does not give the same twice
    with pytest.raises(Stopped):
        train(read("stopped"), callbacks=[Stop()])
    again = train(read("stopped"), resume=True)
    weights = again.model.state_dict()
    assert again.step == 3 and all(torch.equal(weights[name], w) for name, w in loaded.state_dict().items())


def test_there_is_one_for_each_kind_of_model() -> None:
    assert {path.stem for path in EXAMPLES} == set(METRICS)

"""The benchmark beside rivals: what it computes, its files and its processes, without llama.cpp and OpenVINO."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from landmark.nn.rope_scaling import Llama3Rope, base_frequencies

BENCH = Path(__file__).parents[2] / "bench"
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def module(name: str, folder: Path) -> Iterator[ModuleType]:
    """A file of bench/, which is no package."""
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    yield from module("bench_rivals", BENCH)


@pytest.fixture(scope="module")
def worker() -> Iterator[ModuleType]:
    yield from module("worker", BENCH / "rivals")


@pytest.fixture(scope="module")
def weights() -> Iterator[ModuleType]:
    yield from module("llama_weights", BENCH / "rivals")


class Counting:
    """Says the next number."""

    def __init__(self) -> None:
        self.steps = 0

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        self.steps = 0
        return [prompt[-1] + 1 for prompt in prompts]

    def step(self, tokens: Sequence[int]) -> list[int]:
        self.steps += 1
        return [token + 1 for token in tokens]

    def logits(self, prompt: Sequence[int]) -> list[float]:
        return [float(token) for token in prompt]


def test_what_a_worker_answers(worker: ModuleType, tmp_path: Path) -> None:
    runner = Counting()
    assert worker.answer(runner, {"do": "decode", "prompts": [[1, 2], [3, 4]], "steps": 7})["seconds"] > 0
    assert runner.steps == 7
    assert worker.answer(runner, {"do": "prefill", "prompts": [[1, 2]]})["seconds"] > 0 and runner.steps == 0
    file = tmp_path / "logits"
    assert worker.answer(runner, {"do": "logits", "prompt": [3, 1, 2], "file": str(file)}) == {}
    assert np.frombuffer(file.read_bytes(), np.float32).tolist() == [3, 1, 2]
    said = worker.answer(runner, {"do": "memory"})
    assert said["peak"] >= said["resident"] > said["files"] > 2**20
    with pytest.raises(ValueError, match="unknown request 'dance'"):
        worker.answer(runner, {"do": "dance"})


def test_ratios_are_taken_round_by_round(bench: ModuleType) -> None:
    said = bench.summary([(10.0, 5.0), (30.0, 10.0), (8.0, 8.0)])
    assert said == {"ours_tokens_s": 10, "theirs_tokens_s": 8, "ratio": 2, "ratio_min": 1, "ratio_max": 3}


class Fixed:
    """A process that takes as long as told."""

    def __init__(self, seconds: float, order: list[float]) -> None:
        self.seconds, self.order = seconds, order

    def ask(self, do: str, **what: Any) -> dict[str, float]:
        self.order.append(self.seconds)
        return {"seconds": self.seconds}


def test_processes_are_asked_in_turn(bench: ModuleType) -> None:
    order: list[float] = []
    draw = bench.random.Random(0)
    said = bench.compare(Fixed(2.0, order), Fixed(4.0, order), "batch", 50, 3, draw)
    assert order == [4, 2, 2, 4, 4, 2, 2, 4]  # the first round warms up
    assert said["ratio"] == 2 and said["ours_tokens_s"] == 8 * 16 / 2
    assert bench.compare(Fixed(2.0, order), Fixed(1.0, order), "prefill", 50, 1, draw)["theirs_tokens_s"] == 512


def test_cosine(bench: ModuleType) -> None:
    a, b = torch.randn(2, 100, dtype=torch.float64)
    expected = torch.cosine_similarity(a, b, dim=0).item()
    assert bench.cosine(a.tolist(), b.tolist()) == pytest.approx(expected)
    with pytest.raises(ValueError, match="not one model"):
        bench.cosine([1.0], [1.0, 2.0])


def test_pairs_by_name_and_rival(bench: ModuleType) -> None:
    found = bench.chosen("transformers,int8/q8_0")
    assert [(p.ours, p.rival, p.theirs) for p in found] == [
        ("bf16", "transformers", "bf16"),
        ("bf16-11", "transformers", "bf16"),
        ("int8", "llama.cpp", "q8_0"),
    ]
    assert bench.chosen(None) == list(bench.PAIRS)
    with pytest.raises(ValueError, match="no pair or rival 'vllm'; choose of llama"):
        bench.chosen("vllm")


def test_a_rival_without_an_interpreter_is_left_out(bench: ModuleType, tmp_path: Path) -> None:
    here = Path(sys.executable)
    theirs = {"transformers", "transformers.generate"}
    for llama, openvino, left in ((None, here, theirs), (here, None, theirs | {"llama.cpp"})):
        places = bench.Places(tmp_path, llama, openvino)
        assert {pair.rival for pair in bench.PAIRS if places.has(pair)} == left


def test_a_process_that_ends_says_why(bench: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="no such weights"):
        bench.Process([sys.executable, "-c", "raise SystemExit('no such weights')", "file"], 1)


@pytest.mark.parametrize("rival", ["transformers", "transformers.generate"])
def test_tiny_weights_beside_transformers(
    rival: str, bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "MEASURES", {"decode": (1, 8, 2), "prefill": (1, 16, 0)})
    places = bench.Places(tmp_path / "files", None, None, threads=1)
    pair = bench.Pair("bf16", rival, "bf16", 0.999)
    vocab = bench.prepare(places, "tiny", [pair, bench.Pair("int4", "llama.cpp", "q4_0", 0.99)])
    config = json.loads((places.files / "hf" / "bf16" / "config.json").read_text())
    assert config["vocab_size"] == vocab and (places.files / "hf" / "int4" / "model.safetensors").exists()
    rows = bench.measured(places, pair, ["decode", "prefill"], vocab, 1)
    assert [row["measure"] for row in rows] == ["decode", "prefill"]
    assert all(row["cosine"] > 0.999 and row["ratio"] > 0 for row in rows)


def test_frequencies_are_divided_as_ours(weights: ModuleType) -> None:
    ours = Llama3Rope(factor=32.0, low=1.0, high=4.0, original=8192).frequencies(5e5, 64, torch.tensor([1]))
    theirs = base_frequencies(5e5, 64).numpy() / weights.divisors(5e5, 64, LLAMA3)
    np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-5)


def test_rows_go_from_halves_to_pairs(weights: ModuleType) -> None:
    rows = np.arange(8)[:, None] * np.ones((1, 3), int)
    assert weights.interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_weights_are_read_and_named(weights: ModuleType, tmp_path: Path) -> None:
    down, norm = "model.layers.3.mlp.down_proj.weight", "model.norm.weight"
    made = {down: torch.randn(4, 6).bfloat16(), norm: torch.ones(5).bfloat16()}
    save_file(made, tmp_path / "a.safetensors")
    read = weights.tensors(tmp_path / "a.safetensors")
    for name, tensor in made.items():
        assert np.array_equal(read[name], tensor.view(torch.int16).numpy().view(np.uint16))
    assert sorted(map(weights.target, read)) == ["blk.3.ffn_down.weight", "output_norm.weight"]
    save_file({"x": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="F32; only bfloat16"):
        weights.tensors(tmp_path / "b.safetensors")


def test_experts_are_stacked_in_their_order(weights: ModuleType) -> None:
    inner = "model.layers.3.block_sparse_moe"
    each = {f"{inner}.experts.{e}.w2.weight": np.full((2, 3), 10 * e, np.uint16) for e in (2, 3, 0, 1)}
    others = {f"{inner}.gate.weight": np.zeros((4, 3), np.uint16)}
    found = dict(weights.stacked(each | others))
    assert list(found) == [f"{inner}.gate.weight", f"{inner}.experts.w2.weight"]
    assert found[f"{inner}.experts.w2.weight"][:, 0, 0].tolist() == [0, 10, 20, 30]
    names = [weights.target(name) for name in found]
    assert names == ["blk.3.ffn_gate_inp.weight", "blk.3.ffn_down_exps.weight"]

"""Two processes train like one: the same losses and weights, whatever is sharded and wherever checkpoints come from."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import landmark
from landmark.objectives.lm import CausalLM
from landmark.parallel.world import world
from landmark.train import (
    Adafactor,
    AdamW,
    Callback,
    Checkpoints,
    Constant,
    Evaluation,
    Interrupted,
    Lion,
    Muon,
    Settings,
    export,
    fit,
)
from landmark.train.optim.base import OptimizerConfig
from tests.parallel.launch import Workers
from tests.train.common import Stream, batch_of, tiny

HELD_OUT = [batch_of(900 + i, rows=2, uneven=True) for i in range(3)]  # an odd number, for two processes


class Stop(Callback):
    """Ctrl-C in the third update, in one process."""

    def update(self, run: Any, record: dict[str, Any]) -> None:
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def train(
    out: Path, parallel: str, optimizer: OptimizerConfig = AdamW.Config(), dtype: str = "float32", *ways: str
) -> None:
    """6 updates of 2 micro-batches of 4 rows, shared among the processes that there are, with uneven targets."""
    with world() as here:
        data = Stream(rows=4, rank=here.rank, world=here.size, uneven=True)
        settings = Settings(
            steps=6, accumulate=2, schedule=Constant(), parallel=parallel, optimizer=optimizer, dtype=dtype,
            evaluation=Evaluation(every=3), checkpoints=Checkpoints(every=2), peak_flops=1e12,
            recompute="recompute" in ways,
        )  # fmt: skip
        model = tiny(seed=here.rank)  # the first process's weights count
        callbacks = [Stop()] if "stop" in ways else []
        try:
            fit(
                model,
                CausalLM(),
                data,
                settings,
                out=out,
                held_out=HELD_OUT,
                resume="resume" in ways,
                callbacks=callbacks,
            )
            assert "stop" not in ways
        except Interrupted:
            assert "stop" in ways


@pytest.fixture(scope="module")
def go() -> Iterator[Callable[..., None]]:
    """go(processes, out, ...): `train` in so many processes."""
    workers = Workers(2)
    yield lambda size, *how: train(*how) if size == 1 else workers.run(train, *how)
    workers.close()


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [[r["held_out"]["bits_per_byte"]] if "held_out" in r else [r["loss"], r["grad_norm"]] for r in lines]
    return [value for values in kept for value in values]


def check_equal(a: Path, b: Path, *, rtol: float = 1e-4, weights: bool = True) -> None:
    assert losses(a) == pytest.approx(losses(b), rel=rtol)
    ours, theirs = landmark.load(a).state_dict(), landmark.load(b).state_dict()
    for name in theirs if weights else ():
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-4)


# Lion's sign and Muon's bfloat16 iteration magnify the rounding of a sum in another order: there, losses must do.
OPTIMIZERS = [AdamW.Config(), Muon.Config(), Adafactor.Config(), Lion.Config()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda config: config.type_name)
def test_two_processes_train_like_one(go: Callable[..., None], tmp_path: Path, optimizer: OptimizerConfig) -> None:
    exact = isinstance(optimizer, AdamW.Config | Adafactor.Config)
    go(1, tmp_path / "one", "ddp", optimizer)
    for parallel in ("ddp", "fsdp"):
        go(2, tmp_path / parallel, parallel, optimizer)
        check_equal(tmp_path / parallel, tmp_path / "one", weights=exact)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_in_bfloat16(go: Callable[..., None], tmp_path: Path, parallel: str) -> None:
    go(1, tmp_path / "one", parallel, AdamW.Config(), "bfloat16")
    go(2, tmp_path / "two", parallel, AdamW.Config(), "bfloat16")
    check_equal(tmp_path / "two", tmp_path / "one", rtol=2e-2, weights=False)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 2)])
def test_goes_on_with_other_processes(
    go: Callable[..., None], tmp_path: Path, parallel: str, sizes: tuple[int, int]
) -> None:
    """Stopped after 3 of 6 updates, the run goes on with more or fewer processes; its log is that of one process."""
    go(1, tmp_path / "one", parallel)
    go(sizes[0], tmp_path / "cut", parallel, AdamW.Config(), "float32", "stop")
    assert (tmp_path / "cut" / "checkpoints" / "LATEST").read_text() == "step-00000003\n"
    sharded = parallel == "fsdp" and sizes[0] > 1
    assert (tmp_path / "cut" / "checkpoints" / "step-00000003" / "shards").is_dir() is sharded
    go(sizes[1], tmp_path / "cut", parallel, AdamW.Config(), "float32", "resume")
    check_equal(tmp_path / "cut", tmp_path / "one")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_with_recomputation(go: Callable[..., None], tmp_path: Path, parallel: str) -> None:
    go(1, tmp_path / "one", parallel)
    go(2, tmp_path / "two", parallel, AdamW.Config(), "float32", "recompute")
    check_equal(tmp_path / "two", tmp_path / "one")


def test_a_sharded_checkpoint_becomes_a_model_directory(go: Callable[..., None], tmp_path: Path) -> None:
    go(2, tmp_path / "run", "fsdp")
    last = tmp_path / "run" / "checkpoints" / "step-00000006"
    assert {path.suffix for path in last.rglob("*") if path.is_file()} == {".safetensors", ".json"}  # no pickle
    export(last, tmp_path / "exported")
    tokens = batch_of(0).tokens
    with torch.no_grad():
        assert torch.equal(landmark.load(tmp_path / "exported")(tokens), landmark.load(tmp_path / "run")(tokens))


def test_float32_shards_go_on_as_bfloat16_with_masters_and_back(go: Callable[..., None], tmp_path: Path) -> None:
    go(1, tmp_path / "one", "fsdp", AdamW.Config(), "bfloat16")
    for first, second in ((2, 1), (1, 2)):
        out = tmp_path / f"from {first}"
        go(first, out, "fsdp", AdamW.Config(), "bfloat16", "stop")
        go(second, out, "fsdp", AdamW.Config(), "bfloat16", "resume")
        check_equal(out, tmp_path / "one", rtol=2e-2, weights=False)

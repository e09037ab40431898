"""Experts in two processes: the bias follows the load of both, and the weights are those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import landmark
from landmark.nn.router import SigmoidTopK
from landmark.objectives.lm import CausalLM
from landmark.parallel.world import world
from landmark.train import AdamW, Checkpoints, Constant, Settings, fit
from tests.nn.test_moe import sparse
from tests.parallel.launch import Workers
from tests.train.common import Stream


def train(out: Path, parallel: str, steps: int, resume: bool) -> None:
    with world() as here:
        data = Stream(rows=4, rank=here.rank, world=here.size)
        settings = Settings(
            steps=4, accumulate=2, schedule=Constant(), parallel=parallel, optimizer=AdamW.Config(),
            checkpoints=Checkpoints(every=2), peak_flops=1e12,
        )  # fmt: skip
        if steps < 4:
            data.end = 2 * steps
            with pytest.raises(ValueError, match="the data ended"):
                fit(sparse(SigmoidTopK.Config(bias_rate=0.125)), CausalLM(), data, settings, out=out)
        else:
            fit(sparse(SigmoidTopK.Config(bias_rate=0.125)), CausalLM(), data, settings, out=out, resume=resume)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    two = Workers(2)
    yield two
    two.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("alone")
    train(out, "ddp", 4, False)
    return landmark.load(out).state_dict()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(parallel: str, workers: Workers, alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """In one go, and stopped after two updates and gone on with."""
    bias = "layers.1.ffn.fn.router.bias"
    assert alone[bias].any()
    workers.run(train, tmp_path / "whole", parallel, 4, False)
    workers.run(train, tmp_path / "parts", parallel, 2, False)
    workers.run(train, tmp_path / "parts", parallel, 4, True)
    whole, parts = (landmark.load(tmp_path / name).state_dict() for name in ("whole", "parts"))
    for name, tensor in alone.items():
        assert torch.equal(whole[name], parts[name]), name
        torch.testing.assert_close(whole[name], tensor, rtol=2e-3, atol=2e-4)
    assert torch.equal(whole[bias], alone[bias])

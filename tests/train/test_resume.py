"""A run that is killed, again and again and at any moment, ends with the same bits as one never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from landmark.weights.files import read_tensors

# One process imports, and forks a child for each run. Saves are slowed down, so that kills fall into them; dropout,
# accumulation and an optimiser of two parts make every kind of state matter.
LAUNCHER = """
import os, sys, time
import torch
torch.set_num_threads(1)
from landmark.objectives.lm import CausalLM
from landmark.train import Checkpoints, Cosine, Evaluation, Muon, Settings, checkpoint, fit
from tests.train.common import Stream, batch_of, tiny

plain = checkpoint.save_file

def train(out, dtype, slow):
    def slowly(*args, **options):
        time.sleep(slow)
        plain(*args, **options)
        time.sleep(slow)
    checkpoint.save_file = slowly
    settings = Settings(
        steps=24, accumulate=2, dtype=dtype, optimizer=Muon.Config(), schedule=Cosine(warmup=4),
        checkpoints=Checkpoints(every=3, keep=2), evaluation=Evaluation(every=5), peak_flops=1e12,
    )
    fit(tiny(dropout=0.2), CausalLM(), Stream(), settings, out=out, held_out=[batch_of(999)], resume=True)

for line in sys.stdin:
    out, dtype, slow = line.split()
    pid = os.fork()
    if pid == 0:
        train(out, dtype, float(slow))
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def launcher() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], env=environment, **pipes) as process:
        yield process
        process.stdin.close()


def start(launcher: subprocess.Popen[str], out: Path, dtype: str, slow: float = 0.0) -> int:
    """The process id of a run."""
    launcher.stdin.write(f"{out} {dtype} {slow}\n")
    launcher.stdin.flush()
    return int(launcher.stdout.readline())


def wait(launcher: subprocess.Popen[str]) -> int:
    return int(launcher.stdout.readline())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_at_any_moment(launcher: subprocess.Popen[str], tmp_path: Path, dtype: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start(launcher, whole, dtype)
    assert wait(launcher) == 0
    seed = time.time_ns()
    chance, kills, during_save = random.Random(seed), 0, 0
    for attempt in range(100):
        pid = start(launcher, broken, dtype, slow=0.03)
        if attempt < 8:
            wait_for_update(broken)
            time.sleep(chance.uniform(0.0, 0.15))
            with suppress(ProcessLookupError):  # it was faster
                os.kill(pid, signal.SIGKILL)
        status = wait(launcher)
        if status == 0:
            break
        assert status == signal.SIGKILL
        kills += 1
        during_save += any((broken / "checkpoints").glob(".*.tmp"))
    print(f"seed {seed}: {kills} kills, {during_save} of them during a save")
    assert status == 0 and kills >= 3
    ours, theirs = read_tensors(broken), read_tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert records(broken) == records(whole)
    assert not list((broken / "checkpoints").glob(".*"))


def wait_for_update(out: Path) -> None:
    """Until the log, which a run that goes on writes anew, is written."""
    path, since = out / "metrics.jsonl", time.monotonic()
    before = path.stat().st_mtime_ns if path.exists() else 0
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert time.monotonic() - since < 60, "the run did not begin"
        time.sleep(0.002)


def records(out: Path) -> list[dict]:
    """The log without what depends on the clock."""
    clock = ("tokens_per_s", "mfu", "memory")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]

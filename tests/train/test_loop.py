"""The loop: accumulation, evaluation, records, checkpoints, and everything that can go wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import landmark
from landmark.objectives.base import Loss
from landmark.objectives.lm import CausalLM
from landmark.train import (
    WSD,
    Adafactor,
    AdamW,
    Callback,
    Checkpoints,
    Constant,
    Cosine,
    Diverged,
    Evaluation,
    Interrupted,
    Lion,
    Muon,
    Settings,
    checkpoint,
    fit,
)
from landmark.train.metrics import Log
from landmark.train.optim.base import OptimizerConfig
from tests.train.common import Stream, batch_of, rows_of, same, tiny, weights


def settings(steps: int = 6, **keys: Any) -> Settings:
    return Settings(**{"steps": steps, "schedule": Constant(), "peak_flops": 1e12, **keys})


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Parts(Stream):
    """The batches of `Stream`, in pieces of one row."""

    def __init__(self) -> None:
        super().__init__(uneven=True)
        self.left: list[Any] = []

    def __next__(self) -> Any:
        if not self.left:
            batch = super().__next__()
            self.left = [rows_of(batch, i, i + 1) for i in range(self.rows)]
        return self.left.pop(0)


def test_accumulation_does_not_change_the_loss(tmp_path: Path) -> None:
    """Four rows with different numbers of targets, at once and one by one."""
    one = fit(tiny(), CausalLM(), Stream(uneven=True), settings(), out=tmp_path / "one")
    four = fit(tiny(), CausalLM(), Parts(), settings(accumulate=4), out=tmp_path / "four")
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "four"), strict=True):
        for name in ("loss", "nll", "bits_per_byte", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-5), name
        assert a["tokens"] == b["tokens"]
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(tensor, four.model.state_dict()[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "optimizer", [AdamW.Config(lr=1e-2), Adafactor.Config(lr=3e-2), Lion.Config(lr=2e-3), Muon.Config(lr=1e-2)]
)
def test_learns(tmp_path: Path, dtype: str, optimizer: OptimizerConfig) -> None:
    how = settings(120, dtype=dtype, optimizer=optimizer, schedule=Cosine(warmup=10))
    run = fit(tiny(), CausalLM(), Stream(rows=16), how, out=tmp_path, held_out=[batch_of(10_000, 16)])
    first, last = (r["held_out"]["loss"] for r in records(tmp_path) if "held_out" in r)
    assert first == pytest.approx(math.log(61), rel=0.02)
    assert last < 1.6
    assert run.evaluated == (120, pytest.approx(records(tmp_path)[-1]["held_out"]))
    assert not run.model.training


def test_what_is_saved_is_the_model(tmp_path: Path) -> None:
    run = fit(tiny(), CausalLM(), Stream(), settings(), out=tmp_path)
    tokens = batch_of(5).tokens
    with torch.no_grad():
        assert torch.equal(landmark.load(tmp_path)(tokens), run.model(tokens))
        assert torch.equal(landmark.load(run.store.latest())(tokens), run.model(tokens))


def test_records(tmp_path: Path) -> None:
    fit(tiny(), CausalLM(), Stream(), settings(clip=0.5), out=tmp_path)
    lines = records(tmp_path)
    assert [r["step"] for r in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["tokens"] == 6 * 4 * 24
    assert lines[0]["bits_per_byte"] == pytest.approx(lines[0]["nll"] / math.log(2) / 3)
    assert all(r["tokens_per_s"] > 0 and r["memory"] > 1e7 and r["lr"] == 1e-3 for r in lines)
    flops = landmark.models.inspect.training_flops(tiny(), 24)
    assert lines[0]["mfu"] == pytest.approx(lines[0]["tokens_per_s"] * flops / 1e12)


def test_evaluation_and_samples_leave_no_trace(tmp_path: Path) -> None:
    """With dropout and a sampler that draws, a run with evaluations equals one without."""
    seen: list[list[str]] = []

    class Look(Callback):
        def evaluated(self, run: Any, record: dict[str, Any]) -> None:
            seen.append(record["samples"])

    def sample(model: torch.nn.Module) -> list[str]:
        assert not model.training
        return [str(torch.rand(()).item())]

    plain = fit(tiny(dropout=0.3), CausalLM(), Stream(), settings(), out=tmp_path / "a")
    looked = fit(
        tiny(dropout=0.3), CausalLM(), Stream(), settings(evaluation=Evaluation(every=2)), out=tmp_path / "b",
        held_out=[batch_of(7), batch_of(8)], sample=sample, callbacks=[Look()],
    )  # fmt: skip
    assert same(weights(plain.model), weights(looked.model))
    assert len(seen) == 4


def test_held_out_means_weigh_every_target_equally(tmp_path: Path) -> None:
    held = [batch_of(1, uneven=True), batch_of(2), batch_of(3, rows=1)]
    run = fit(tiny(), CausalLM(), Stream(), settings(1), out=tmp_path, held_out=held)
    with torch.no_grad():
        losses = [CausalLM().loss(run.model, batch) for batch in held]
    expected = sum(loss.sum for loss in losses) / sum(loss.count for loss in losses)
    assert run.evaluated is not None and run.evaluated[1]["loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputation_changes_no_bit(tmp_path: Path, dtype: str) -> None:
    runs = [
        fit(tiny(dropout=0.2), CausalLM(), Stream(), settings(dtype=dtype, recompute=r), out=tmp_path / str(r))
        for r in (False, True)
    ]
    assert same(weights(runs[0].model), weights(runs[1].model))
    assert "forward" not in vars(runs[1].model.layers[0])


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_train_the_same(tmp_path: Path, recompute: bool) -> None:
    plain = fit(tiny(), CausalLM(), Stream(), settings(3), out=tmp_path / "a")
    fast = fit(tiny(), CausalLM(), Stream(), settings(3, compile=True, recompute=recompute), out=tmp_path / "b")
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(tensor, fast.model.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_old_checkpoints_go_but_the_best_stays(tmp_path: Path) -> None:
    """Lion at a rate that soon does harm: the best held-out loss comes early."""
    every = Checkpoints(every=2, keep=2, best=True)
    how = settings(10, optimizer=Lion.Config(lr=0.2), checkpoints=every, evaluation=Evaluation(every=2))
    run = fit(tiny(), CausalLM(), Stream(), how, out=tmp_path, held_out=[batch_of(9)])
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    losses = {r["step"]: r["held_out"]["loss"] for r in records(tmp_path) if r.get("held_out") and r["step"]}
    best = f"step-{min(losses, key=losses.__getitem__):08}"
    assert names == sorted({"LATEST", best, "step-00000008", "step-00000010"})
    assert run.best is not None and run.best[0] == best


class Stop(Callback):
    """Ctrl-C during an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def update(self, run: Any, record: dict[str, Any]) -> None:
        if run.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = fit(tiny(dropout=0.2), CausalLM(), Stream(), settings(), out=tmp_path / "whole")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped after 3 of 6 updates, all saved in .*step-00000003"):
        fit(tiny(dropout=0.2), CausalLM(), Stream(), settings(), out=tmp_path / "cut", callbacks=[Stop(3)])
    assert signal.getsignal(signal.SIGINT) is handler
    rest = fit(tiny(seed=9, dropout=0.2), CausalLM(), Stream(), settings(), out=tmp_path / "cut", resume=True)
    assert same(weights(whole.model), weights(rest.model))
    assert [r["step"] for r in records(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]


class Poisoned(CausalLM):
    """Not a number in micro-batch 7."""

    calls = [0]

    def loss(self, model: Any, batch: Any) -> Loss:
        loss = super().loss(model, batch)
        self.calls[0] += 1
        return Loss(loss.sum * (math.nan if self.calls[0] == 7 else 1.0), loss.count, loss.metrics)


def test_nan_stops_and_says_where(tmp_path: Path) -> None:
    Poisoned.calls[0] = 0
    model = tiny()
    with pytest.raises(
        Diverged, match=r"the loss is nan in update 4, micro-batch 1 of 2; the last good checkpoint is .*step-00000002"
    ):
        fit(model, Poisoned(), Stream(), settings(accumulate=2, checkpoints=Checkpoints(every=2)), out=tmp_path)
    assert all(p.isfinite().all() for p in model.parameters())
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step-00000002\n"


def test_infinite_gradient_stops(tmp_path: Path) -> None:
    model = tiny()
    model.embed.tokens.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(Diverged, match=r"the gradient's norm is (nan|inf) in update 1; no checkpoint was written yet"):
        fit(model, CausalLM(), Stream(), settings(), out=tmp_path)


@pytest.mark.parametrize("file", ["optimizer.safetensors", "model.safetensors"])
def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    def full(tensors: Any, path: Path, **options: Any) -> None:
        saves.append(path)
        plain(tensors, path, **options)
        if len(saves) > 1 and file in path.name:
            os.truncate(path, 100)
            raise OSError(errno.ENOSPC, "No space left on device")

    saves: list[Path] = []
    module = landmark.weights.files if file.startswith("model") else checkpoint
    plain = module.save_file
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*; the last good checkpoint is .*step-00000002"):
        fit(tiny(), CausalLM(), Stream(), settings(checkpoints=Checkpoints(every=2)), out=tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["LATEST", "step-00000002"]
    monkeypatch.undo()
    rest = fit(tiny(seed=3), CausalLM(), Stream(), settings(), out=tmp_path, resume=True)
    whole = fit(tiny(), CausalLM(), Stream(), settings(), out=tmp_path / "whole")
    assert same(weights(rest.model), weights(whole.model))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_full_disk_for_the_log(tmp_path: Path) -> None:
    log = Log(tmp_path / "metrics.jsonl", 0)
    log.file = open("/dev/full", "a")
    with pytest.raises(OSError, match="No space left"):
        log.write({"step": 1})


def test_going_on_with_other_settings(tmp_path: Path) -> None:
    def go(resume: bool = True, **keys: Any) -> None:
        fit(tiny(), CausalLM(), Stream(), settings(**{"schedule": WSD(), **keys}), out=tmp_path, resume=resume)

    with pytest.raises(Interrupted):
        fit(tiny(), CausalLM(), Stream(), settings(schedule=WSD()), out=tmp_path, callbacks=[Stop(2)])
    with pytest.raises(ValueError, match=r"holds a run already; go on with it \(--resume\)"):
        go(resume=False)
    with pytest.raises(ValueError, match=r"begun with optimizer.lr = 0.001, and cannot go on with 0.01"):
        go(optimizer=AdamW.Config(lr=1e-2))
    with pytest.raises(ValueError, match=r"begun with optimizer = 'AdamW', and cannot go on with 'Lion'"):
        go(optimizer=Lion.Config(lr=1e-3))
    with pytest.raises(ValueError, match=r"begun with steps = 6, and cannot go on with 2"):
        go(steps=2)
    go(steps=30, evaluation=Evaluation(every=1), checkpoints=Checkpoints(keep=1))  # WSD has not begun to decay
    assert records(tmp_path)[-1]["step"] == 30


def test_a_finished_run_goes_on_to_nothing(tmp_path: Path) -> None:
    run = fit(tiny(), CausalLM(), Stream(), settings(), out=tmp_path, held_out=[batch_of(3)])
    before = (tmp_path / "metrics.jsonl").read_text()
    again = fit(tiny(seed=4), CausalLM(), Stream(), settings(), out=tmp_path, held_out=[batch_of(3)], resume=True)
    assert same(weights(run.model), weights(again.model)) and again.evaluated == run.evaluated
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_corrupt_checkpoint_is_named(tmp_path: Path) -> None:
    fit(tiny(), CausalLM(), Stream(), settings(2), out=tmp_path)
    path = tmp_path / "checkpoints" / "step-00000002" / "optimizer.safetensors"
    os.truncate(path, 200)
    with pytest.raises(ValueError, match=r"optimizer.safetensors is missing, truncated or corrupt"):
        fit(tiny(), CausalLM(), Stream(), settings(2), out=tmp_path, resume=True)
    (tmp_path / "checkpoints" / "LATEST").write_text("step-00000001\n")
    with pytest.raises(ValueError, match=r"LATEST names step-00000001, which is gone"):
        fit(tiny(), CausalLM(), Stream(), settings(2), out=tmp_path, resume=True)


def test_the_data_ends(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the data ended in update 4 of 6"):
        fit(tiny(), CausalLM(), Stream(end=3), settings(), out=tmp_path)


def test_out_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="is a file; a run needs a directory of its own"):
        fit(tiny(), CausalLM(), Stream(), settings(), out=tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"steps": 0}, "Settings.steps is 0"),
        ({"steps": -5}, "Settings.steps is -5"),
        ({"accumulate": 0}, "Settings.accumulate is 0"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"clip": math.nan}, "clip is nan"),
        ({"schedule": Cosine(warmup=100)}, "schedule.warmup is 100, but the run has only 6 steps"),
    ],
)
def test_absurd_settings(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**keys)


def test_a_batch_without_targets_is_no_divergence(tmp_path: Path) -> None:
    """A masked or short batch may have nothing to learn; weights then move by decay and momentum alone."""

    class Bare(Stream):
        def __next__(self) -> Any:
            batch = super().__next__()
            return dataclasses.replace(batch, targets=torch.full_like(batch.targets, -100), n_bytes=0)

    fit(tiny(), CausalLM(), Bare(), settings(2), out=tmp_path)
    assert [r["loss"] for r in records(tmp_path)] == [0.0, 0.0]
    assert all("bits_per_byte" not in r and r["grad_norm"] == 0.0 for r in records(tmp_path))

"""Compiled blocks: the same losses as plain ones, and a clear word where they cannot be compiled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from landmark.models.base import Model
from landmark.models.pattern import pattern
from landmark.objectives.lm import CausalLM
from landmark.train import Callback, Run
from landmark.train.blocks import transformed
from landmark.train.config import Settings
from landmark.train.loop import fit
from landmark.train.schedule import Constant

from .common import VOCAB, Stream, batch_of, tiny


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def update(self, run: Run, record: dict[str, Any]) -> None:
        self.seen.append(record["loss"])


def losses(out: Path, **keys: Any) -> list[float]:
    told = Losses()
    settings = Settings(steps=3, schedule=Constant(), peak_flops=1e12, **keys)
    fit(tiny(num_hidden_layers=1), CausalLM(), Stream(), settings, out=out, callbacks=[told])
    return told.seen


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
def test_compiled_training_has_the_same_losses(tmp_path: Path) -> None:
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled", compile=True)
    assert compiled == pytest.approx(plain, rel=1e-6)


def gradient(model: Model) -> tuple[float, torch.Tensor]:
    loss = CausalLM().loss(model, batch_of(0)).sum
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("mixer", ["attention", "mamba2", "ttt"])
def test_our_kernels_are_seen_through(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs in C is an op to the compiler, or is left to torch."""
    eager = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: eager(f, backend="aot_eager"))
    torch.manual_seed(0)
    model = pattern(mixer, dim=32, vocab=VOCAB).build().train()
    want, slopes = gradient(model)
    model.zero_grad()
    with transformed(model, recompute=False, compile=True):
        have, compiled = gradient(model)
    assert have == pytest.approx(want, rel=1e-6)
    torch.testing.assert_close(compiled, slopes, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="recompute and compile do not go together"):
        Settings(steps=200, recompute=True, compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler, and there is no no-such-compiler"):
        losses(tmp_path / "run", compile=True)

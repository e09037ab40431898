"""What the bar says of an update."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from landmark.train.progress import Bar, Lines


@pytest.mark.parametrize("bits", [1.5, None])
def test_the_bar_leaves_out_what_a_run_does_not_have(bits: float | None) -> None:
    run: Any = SimpleNamespace(step=1, settings=SimpleNamespace(steps=10))
    record = {"loss": 2.0, "tokens_per_s": 1000.0} | ({} if bits is None else {"bits_per_byte": bits})
    bar = Bar()
    bar.begin(run)
    bar.update(run, record)
    bar.end(run)
    assert bar.progress is not None
    figures = bar.progress.tasks[0].fields["figures"]
    middle = "" if bits is None else " · 1.500 bits/byte"
    assert figures == f"loss 2.000{middle} · 1,000 tokens/s"


def test_samples_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A model that has learned little writes any byte; ESC c resets a terminal."""
    record = {"step": 1, "held_out": {"loss": 2.0}, "samples": ["a\x1bcb"]}
    for callback in (Bar(), Lines()):
        callback.evaluated(SimpleNamespace(), record)  # type: ignore[arg-type]
        assert "acb" in (told := capsys.readouterr().err) and "\x1b" not in told

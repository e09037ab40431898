"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..terminal import printable
from .loop import Callback, Run

if TYPE_CHECKING:
    from rich.progress import Progress


class Bar(Callback):
    """A progress bar with loss, bits per byte, tokens/s and time left; evaluations and samples scroll by above it."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.progress: Progress | None = None
        self.loss = self.speed = self.bits = float("nan")

    def begin(self, run: Run) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("training"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console,
        )  # fmt: skip
        self.task = self.progress.add_task("", total=run.settings.steps, completed=run.step, figures="")
        self.progress.start()

    def update(self, run: Run, record: dict[str, Any]) -> None:
        assert self.progress is not None
        self.loss = _smooth(self.loss, record["loss"])
        self.speed = _smooth(self.speed, record["tokens_per_s"])
        bits = ""
        if "bits_per_byte" in record:  # not of labels, nor of other things than text
            self.bits = _smooth(self.bits, record["bits_per_byte"])
            bits = f" · {self.bits:.3f} bits/byte"
        figures = f"loss {self.loss:.3f}{bits} · {self.speed:,.0f} tokens/s"
        self.progress.update(self.task, completed=run.step, figures=figures)

    def evaluated(self, run: Run, record: dict[str, Any]) -> None:
        self.console.print(evaluation_line(record), highlight=False, markup=False)
        for text in record.get("samples", ()):
            self.console.print(printable(text), style="dim", highlight=False, markup=False)

    def end(self, run: Run) -> None:
        if self.progress is not None:
            self.progress.stop()


class Lines(Callback):
    """A line for the first updates, then one every so many seconds; every evaluation and checkpoint."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds, self.last = seconds, 0.0

    def update(self, run: Run, record: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self.last >= self.seconds or run.step == run.settings.steps:
            self.last = now
            bits = f" · {record['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in record else ""
            _say(
                f"update {run.step}/{run.settings.steps} · loss {record['loss']:.4f}{bits} · "
                f"lr {record['lr']:.2e} · norm {record['grad_norm']:.2f} · {record['tokens_per_s']:,.0f} tokens/s"
            )

    def evaluated(self, run: Run, record: dict[str, Any]) -> None:
        _say(evaluation_line(record))
        for text in record.get("samples", ()):
            _say("  " + printable(text).replace("\n", "\n  "))

    def saved(self, run: Run, directory: Path) -> None:
        _say(f"saved {directory}")


def progress() -> Callback:
    """What suits standard error."""
    return Bar() if sys.stderr.isatty() else Lines()


def evaluation_line(record: dict[str, Any]) -> str:
    figures = " · ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in record["held_out"].items())
    return f"after {record['step']} updates, held out: {figures}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _smooth(mean: float, value: float) -> float:
    return value if mean != mean else 0.9 * mean + 0.1 * value

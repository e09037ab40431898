"""Where experiments run: cells of a grid, each computed once, on all cores, and kept; a stopped run goes on."""

from __future__ import annotations

import hashlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from ..weights.files import naming
from .learn import only

Cell = dict[str, Any]


class Lab:
    """`full`: the longer version of an experiment; `seeds`: at least five; `folder`: where its cells are kept.

    `quick`: see that an experiment runs, and no more: two updates of every training, in this process.
    """

    def __init__(
        self, folder: Path, *, full: bool = False, quick: bool = False, seeds: int = 5, workers: int | None = None,
        quiet: bool = False,
    ) -> None:  # fmt: skip
        if full and quick:
            raise ValueError("an experiment is either full or quick; choose one")
        if seeds < 2:
            raise ValueError(f"{seeds} seeds say nothing of how sure a result is; take at least 2")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; an experiment needs a directory")
        self.folder, self.full, self.quick, self.seeds = folder, full, quick, range(seeds)
        self.workers, self.quiet = workers or os.cpu_count() or 1, quiet

    def grid(self, function: Callable[..., Cell], cases: Sequence[Mapping[str, Any]]) -> list[Cell]:
        """`function(**case)` for every case, in the order of the cases; what was computed before is read back.

        `function` is defined at the top of its file, and returns names and numbers. Its results count as computed
        before only while its file is the same. Each process computes on one thread.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "cells.jsonl"
        code = hashlib.sha256(Path(inspect.getsourcefile(function) or "").read_bytes()).hexdigest()[:16]
        keys = [json.dumps([function.__qualname__, code, dict(case)], sort_keys=True) for case in cases]
        done = read(path)
        left = [i for i, key in enumerate(keys) if key not in done]
        with naming(path), path.open("a", encoding="utf-8") as file:
            for i, result in self._compute(function, cases, left):
                done[keys[i]] = result
                file.write(json.dumps({"key": keys[i], "result": result}) + "\n")
                file.flush()
        return [{**case, **done[key]} for case, key in zip(cases, keys, strict=True)]

    def _compute(self, function: Callable[..., Cell], cases: Sequence[Mapping[str, Any]], left: list[int]) -> Any:
        if not left:
            return
        if self.quick:
            with only(2):
                yield from ((i, function(**cases[i])) for i in left)
            return
        bar = Progress(function.__name__.replace("_", " "), len(cases), len(cases) - len(left), self.quiet)
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(self.workers, len(left)), context, initializer=_one_thread)
        try:
            futures = {pool.submit(function, **cases[i]): i for i in left}
            for future in as_completed(futures):
                yield futures[future], future.result()
                bar.advance(cases[futures[future]])
            pool.shutdown()
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            bar.close()


def read(path: Path) -> dict[str, Cell]:
    """Cells by key; a line that a kill has cut short is passed over."""
    done: dict[str, Cell] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            done[record["key"]] = record["result"]
    return done


def _one_thread() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


class Progress:
    """A bar with rate and time left on a terminal; a line a cell elsewhere."""

    def __init__(self, title: str, total: int, done: int, quiet: bool) -> None:
        self.title, self.total, self.done, self.began, self.fresh = title, total, done, time.monotonic(), 0
        self.bar: Any = None
        self.quiet = quiet
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Rich

            self.bar = Rich(console=Console(stderr=True))
            self.task = self.bar.add_task(title, total=total, completed=done)
            self.bar.start()

    def advance(self, case: Mapping[str, Any]) -> None:
        self.done, self.fresh = self.done + 1, self.fresh + 1
        each = (time.monotonic() - self.began) / self.fresh
        if self.bar is not None:
            self.bar.advance(self.task)
        elif not self.quiet:
            what = " ".join(f"{name}={value}" for name, value in case.items())
            left = each * (self.total - self.done)
            print(f"{self.title}: {self.done}/{self.total} · {what} · {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def rows(cells: Sequence[Cell], **where: Any) -> list[Cell]:
    """The cells with these values, in their order."""
    return [cell for cell in cells if all(cell[name] == value for name, value in where.items())]


def column(cells: Sequence[Cell], name: str, **where: Any) -> list[float]:
    """One number of each cell with these values, seed by seed."""
    return [cell[name] for cell in rows(cells, **where)]

"""Paired timings: ours and the peer's in turn, A B A B, because the speed of a machine drifts while one measures."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any


def interleave(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median seconds of each after one warm-up; speedup is the median of theirs / ours, round by round."""
    ours(), theirs()
    a, b = [], []
    for _ in range(rounds):
        a.append(seconds(ours))
        b.append(seconds(theirs))
    ratios = [y / x for x, y in zip(a, b, strict=True)]
    return {
        "ours_s": statistics.median(a),
        "theirs_s": statistics.median(b),
        "speedup": statistics.median(ratios),
        "speedup_min": min(ratios),
        "speedup_max": max(ratios),
    }


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """A table, or JSON."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0].keys())
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=160).print(table)

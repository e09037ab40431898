"""`landmark inspect`: what models cost, and how they differ, without their weights."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ..models.diff import Change
    from ..models.inspect import Figures

SIDE_BY_SIDE = 4  # more models than that go one a row


def inspect(
    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="SPEC", help="Directories, config.json files, hub ids, published sizes; none: all."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens that a token sees; default: the longest text of each model.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Number format of the decoding state.")] = "bfloat16",
    diff: Annotated[bool, typer.Option("--diff", help="What changed from each model to the next.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Parameters, FLOPs per token, cache and memory of models, counted without their weights.

    Two models are also compared: landmark inspect gpt2 llama2-7b
    """
    import torch

    from ..models.base import Model
    from ..models.diff import diff as compare
    from ..models.inspect import figures
    from ..models.registry import sizes
    from ..weights.checkpoint import as_dtype, describe

    if diff and len(specs or ()) < 2:
        raise ValueError("--diff shows what changed from one model to the next; name at least two")
    kind, names = as_dtype(dtype), specs or sorted(sizes())
    configs = [describe(name)[0] for name in names]
    rows = []
    for config in configs:
        with torch.device("meta"):
            model = config.build()
        assert isinstance(model, Model)
        rows.append(figures(model, context=context, dtype=kind))
    steps = [compare(*pair) for pair in pairwise(configs)] if diff or len(specs or ()) == 2 else []
    if as_json:
        print(json.dumps(report(names, rows, steps), indent=2))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    console.print(beside(names, rows) if len(names) <= SIDE_BY_SIDE else below(names, rows))
    for (before, after), changes in zip(pairwise(names), steps, strict=False):
        console.print(changed(before, after, changes))


def report(names: list[str], rows: list[Figures], steps: list[list[Change]]) -> dict[str, Any]:
    """The same as data; bytes and FLOPs are whole numbers."""
    models = [{"model": name, **asdict(row)} for name, row in zip(names, rows, strict=True)]
    diffs = [
        {"from": before, "to": after, "changes": [asdict(change) for change in changes]}
        for (before, after), changes in zip(pairwise(names), steps, strict=False)
    ]
    return {"models": models, "diffs": diffs} if diffs else {"models": models}


def beside(names: list[str], rows: list[Figures]) -> Table:
    """One column a model."""
    table = _table("", *names)

    def line(label: str, values: list[str | None]) -> None:
        if any(value is not None for value in values):
            table.add_row(label, *(value or "-" for value in values))

    line("parameters", [f"{r.parameters:,}" for r in rows])
    if any(r.active != r.parameters for r in rows):
        line("  active", [f"{r.active:,}" for r in rows])
    line("  in embedding and head", [f"{r.embedding:,}" for r in rows])
    line("  elsewhere", [f"{r.parameters - r.embedding:,}" for r in rows])
    line("layers", [f"{r.layers:,}" for r in rows])
    line("context, tokens", [f"{r.context:,}" for r in rows])
    line("FLOPs per token, forward", [flops(r.flops) for r in rows])
    line("  training", [flops(r.training_flops) for r in rows])
    line("cache per token", [None if r.cache_per_token is None else f"{r.cache_per_token:,} B" for r in rows])
    if any(r.cache_growth != r.cache_per_token for r in rows):
        line("  past the windows", [None if r.cache_growth is None else f"{r.cache_growth:,} B" for r in rows])
    line("  at that context", [None if r.cache is None else memory(r.cache) for r in rows])
    for kind in kinds(rows):
        line(f"weights, {kind}", [memory(r.memory[kind]) if kind in r.memory else None for r in rows])
    return table


def below(names: list[str], rows: list[Figures]) -> Table:
    """One row a model."""
    formats = kinds(rows)
    table = _table(
        "", "parameters", "active", "layers", "context", "FLOPs/token", "training", "cache/token", "at context",
        *formats,
    )  # fmt: skip
    for name, r in zip(names, rows, strict=True):
        cache = "-" if r.cache_per_token is None else f"{r.cache_per_token:,} B"
        total = "-" if r.cache is None else memory(r.cache)
        table.add_row(
            name, f"{r.parameters:,}", "" if r.active == r.parameters else f"{r.active:,}", f"{r.layers}",
            f"{r.context:,}", flops(r.flops), flops(r.training_flops), cache, total,
            *(memory(r.memory[kind]) if kind in r.memory else "-" for kind in formats),
        )  # fmt: skip
    return table


def kinds(rows: list[Figures]) -> list[str]:
    """Every number format that some model has."""
    return list(dict.fromkeys(kind for r in rows for kind in r.memory))


def changed(before: str, after: str, changes: list[Change]) -> Table:
    """One row a change; places that changed alike share one."""
    from ..config import CONFIGS
    from ..models.diff import show

    places: dict[tuple[str, str, str], list[str]] = {}
    for change in changes:
        old, new = show(change.before), show(change.after)
        name = "" if old in CONFIGS or new in CONFIGS else change.path.rpartition(".")[2]
        places.setdefault((name, old, new), []).append(change.path)
    table = _table(f"{before} -> {after}", before, after)
    table.columns[1].justify = table.columns[2].justify = "left"
    for (_, old, new), paths in places.items():
        table.add_row("\n".join(paths), old, new)
    return table


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i)
    return table


def flops(count: int) -> str:
    """1.5 GFLOP and the like: three digits."""
    return _scaled(count, 1000, ("", "K", "M", "G", "T", "P"))


def memory(count: int) -> str:
    """Bytes in binary units."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    step = 0
    while count >= base and step < len(units) - 1:
        count, step = count / base, step + 1
    return f"{count:.{0 if step == 0 or count >= 100 else 1 if count >= 10 else 2}f} {units[step]}".rstrip()

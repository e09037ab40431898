"""`landmark quickstart`: the main job in one command."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import printable


def quickstart(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/quickstart"),
    steps: Annotated[int, typer.Option(min=4, help="Updates of 4,096 tokens.")] = 900,
    text: Annotated[list[str] | None, typer.Option(help="Text files instead of Python's own documentation.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train a small Llama on real text found on this machine, measure it, and show what it learned."""
    from rich.console import Console

    from ..quickstart import recipe, run
    from ..train.interrupt import Interrupted
    from ..train.progress import progress

    console = Console(stderr=as_json, markup=False)
    config = recipe(out, steps, tuple(text) if text else "embedded")
    try:
        report = run(config, callbacks=[progress()], resume=resume)
    except Interrupted as stop:
        raise Interrupted(f"{stop}; go on with the same command and --resume") from None
    if as_json:
        print(json.dumps(asdict(report), indent=2, ensure_ascii=False))
        return
    show(console, report, out)


def show(console: object, report: object, out: Path) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from ..quickstart import Report

    assert isinstance(console, Console) and isinstance(report, Report)
    table = Table("bits per byte of held-out text", "", title_justify="left", box=None, padding=(0, 2))
    rows = [*asdict(report.baselines).items(), ("this model, untrained", report.bits_per_byte_before)]
    for name, value in sorted(rows, key=lambda row: -row[1]):
        table.add_row(name, f"{value:.3f}")
    table.add_row("this model", f"{report.bits_per_byte:.3f}", style="bold green")
    console.print(table)
    for before, after in zip(report.before, report.after, strict=True):
        console.print(Panel(Text(printable(before)), title="before", title_align="left", border_style="dim"))
        console.print(Panel(Text(printable(after)), title="after", title_align="left", border_style="green"))
    figures = f"{report.parameters / 1e6:.1f} M parameters, {report.tokens_per_second:,.0f} tokens/s"
    console.print(f"{figures}, {report.minutes:.1f} minutes in all. The curve is in {out / 'loss.png'}.\n")
    console.print("Next:", style="bold")
    for command in (
        f"landmark generate {report.model} --prompt 'import os' --temperature 0.7",
        f"landmark chat {report.model}",
        f"landmark inspect {report.model} llama3.1-405b",
        f"landmark eval {report.model} --text README.md",
        "landmark papers 'rotary'",
    ):
        console.print(f"  {command}", style="cyan", highlight=False)

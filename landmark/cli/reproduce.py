"""`landmark reproduce`: the smallest honest experiment behind a paper's claim, run here."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

COLOURS = {"shown": "green", "not shown at this scale": "yellow", "contradicted": "red"}


def reproduce(
    ids: Annotated[list[str] | None, typer.Argument(help="Rows (A2), papers (mamba) or arXiv numbers.")] = None,
    full: Annotated[bool, typer.Option("--full", help="The longer version.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two updates of every training, to see that it runs; verdicts say nothing.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=2, help="Runs of every variant.")] = 5,
    out: Annotated[Path, typer.Option(help="Where reports go, a folder an experiment.")] = Path("runs/reproduce"),
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; as many as cores unless said.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
) -> None:
    """Run the experiments behind papers' claims: claim, ours, verdict. Without an id, list them.

    A run that was stopped goes on with the same command.
    """
    from rich.console import Console

    from ..papers import report
    from ..papers.experiment import find
    from ..papers.lab import Lab

    console = Console()
    if not ids:
        list_experiments(console, out, as_json)
        return
    chosen, reports = [find(name) for name in ids], []
    for experiment in chosen:
        folder = out / (experiment.row + ("-full" if full else "-quick" if quick else ""))
        run = {"full": full, "quick": quick, "seeds": seeds}
        began = time.perf_counter()
        try:
            outcome = experiment.run(Lab(folder, full=full, quick=quick, seeds=seeds, workers=workers))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; {folder} keeps what is done: the same command goes on") from None
        seconds = time.perf_counter() - began
        report.write(folder, experiment, outcome, seconds=seconds, **run)
        reports.append(report.as_data(experiment, outcome, seconds=seconds, **run))
        if not as_json:
            show(console, experiment, outcome, folder, seconds)
            if quick:
                console.print("a quick run: it ran, and its verdicts say nothing", style="bold yellow")
    if as_json:
        print(json.dumps(reports if len(reports) > 1 else reports[0], indent=2, ensure_ascii=False))


def show(console: Any, experiment: Any, outcome: Any, folder: Path, seconds: float) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("claim", "ours", "verdict", title=f"{experiment.row}  {experiment.title}", title_justify="left")
    for f in outcome.findings:
        claim = f"{'control: ' if f.control else ''}{f.claim} ({f.source})"
        table.add_row(escape(claim), escape(f.ours), f"[{COLOURS[f.verdict]}]{f.verdict}[/]")
    console.print(table)
    if outcome.note:
        console.print(outcome.note, style="dim", markup=False)
    console.print(
        f"{outcome.verdict}; {seconds:.0f} s; report, figures and plot in {folder}", style="bold", markup=False
    )


def list_experiments(console: Any, out: Path, as_json: bool) -> None:
    from rich.table import Table

    from ..papers.experiment import experiments
    from ..weights.files import read_object

    last = {}
    for row in experiments():
        path = out / row / "report.json"
        last[row] = read_object(path).get("verdict") if path.exists() else None
    if as_json:
        known = experiments().values()
        listed = [
            {"id": e.row, "paper": e.paper, "title": e.title, "minutes": e.minutes, "last": last[e.row]} for e in known
        ]
        print(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    table = Table("id", "paper", "claim", "minutes", "last verdict here", box=None)
    for e in experiments().values():
        table.add_row(e.row, e.paper, e.title, f"{e.minutes:g}", last[e.row] or "")
    console.print(table)

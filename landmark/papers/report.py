"""The record of an experiment: report.json, report.md and plot.png in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..weights.files import beside, write_json
from .experiment import Experiment, Outcome, Plot


def write(folder: Path, experiment: Experiment, outcome: Outcome, **run: Any) -> None:
    """Write the three files; `run` is what to say of the run: its seeds, its seconds."""
    write_json(folder / "report.json", as_data(experiment, outcome, **run))
    with beside(folder / "report.md") as temporary:
        temporary.write_text(as_markdown(experiment, outcome), encoding="utf-8")
    if outcome.plot is not None:
        draw(outcome.plot, folder / "plot.png")


def as_data(experiment: Experiment, outcome: Outcome, **run: Any) -> dict[str, Any]:
    data = {"id": experiment.row, "paper": experiment.paper, "title": experiment.title, **run}
    plot = {"plot": asdict(outcome.plot)} if outcome.plot else {}
    findings = [asdict(finding) for finding in outcome.findings]
    body = {"verdict": outcome.verdict, "findings": findings, "table": list(outcome.table), "note": outcome.note}
    plain: dict[str, Any] = json.loads(json.dumps({**data, **body, **plot}))
    return plain


def as_markdown(experiment: Experiment, outcome: Outcome) -> str:
    lines = [f"# {experiment.row}: {experiment.title}", "", f"Verdict: **{outcome.verdict}**", ""]
    lines += ["| claim | source | ours | verdict |", "|---|---|---|---|"]
    for f in outcome.findings:
        lines.append(f"| {'control: ' if f.control else ''}{f.claim} | {f.source} | {f.ours} | {f.verdict} |")
    if outcome.note:
        lines += ["", outcome.note]
    if outcome.table:
        names = list(outcome.table[0])
        lines += ["", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        lines += [f"| {' | '.join(number(row[name]) for name in names)} |" for row in outcome.table]
    if outcome.plot is not None:
        lines += ["", "![plot](plot.png)"]
    return "\n".join(lines) + "\n"


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(plot: Plot, path: Path) -> None:
    """Mean and range over seeds of every curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for curve in plot.curves:
        values = np.asarray(curve.values, dtype=float)
        (line,) = axes.plot(curve.x, values.mean(0), "o-", ms=3, label=curve.name)
        if len(values) > 1:
            axes.fill_between(curve.x, values.min(0), values.max(0), alpha=0.2, color=line.get_color(), lw=0)
    axes.set(xlabel=plot.x, ylabel=plot.y)
    axes.set_title(plot.title, fontsize=10)
    if plot.log_x:
        axes.set_xscale("log", base=2)
    if plot.log_y:
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    with beside(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)

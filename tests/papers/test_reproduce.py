"""The mechanism of `landmark reproduce`: verdicts follow from numbers, cells are kept, experiments are listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from landmark.cli.main import app
from landmark.papers.catalogue import load
from landmark.papers.experiment import (
    Curve,
    Experiment,
    Finding,
    Outcome,
    Plot,
    Verdict,
    equal,
    exceeds,
    experiments,
    find,
    reaches,
    stays_below,
)  # fmt: skip
from landmark.papers.lab import Lab, column, read
from landmark.papers.report import write


def logged(x: int, seed: int, log: str) -> dict[str, float]:
    with open(f"{log}-{x}-{seed}", "a") as file:
        file.write("ran\n")
    return {"y": x * 10 + seed}


def test_cells_are_computed_once_and_a_torn_line_again(tmp_path: Path) -> None:
    cases = [{"x": x, "seed": s, "log": str(tmp_path / "log")} for x in (1, 2) for s in range(2)]
    lab = Lab(tmp_path / "lab", seeds=2, workers=1, quiet=True)
    first = lab.grid(logged, cases)
    assert column(first, "y", x=2) == [20, 21]
    path = tmp_path / "lab" / "cells.jsonl"
    path.write_text(path.read_text()[:-5])  # a kill in the middle of a line
    assert len(read(path)) == 3
    with path.open("a") as file:
        file.write("\n")
    assert lab.grid(logged, cases) == first
    assert sum(len(p.read_text().split()) for p in tmp_path.glob("log-*")) == 5


def test_verdicts() -> None:
    more, less = [1.0, 1.1, 0.9, 1.05, 1.0], [0.5, 0.55, 0.4, 0.5, 0.45]
    assert exceeds("", "", "", more, less).verdict is Verdict.shown
    assert exceeds("", "", "", more, less, by=0.6).verdict is Verdict.not_shown
    assert exceeds("", "", "", less, more).verdict is Verdict.contradicted
    assert exceeds("", "", "", [1.0, 0.0, 1.0], [0.5, 0.4, 0.6]).verdict is Verdict.not_shown
    assert reaches("", "", "", [0.9, 1.0], 0.95).verdict is Verdict.shown
    assert reaches("", "", "", [0.8, 1.0], 0.95).verdict is Verdict.not_shown
    assert stays_below("", "", "", [0.1, 0.3], 0.15).verdict is Verdict.not_shown
    assert equal("", "", "", 1e-12, 1e-10).verdict is Verdict.shown
    assert equal("", "", "", 1e-9, 1e-10).verdict is Verdict.contradicted


def outcome(*verdicts: Verdict, control: Verdict = Verdict.shown) -> Outcome:
    findings = [Finding("", "", "", verdict) for verdict in verdicts]
    return Outcome([*findings, Finding("", "", "", control, control=True)])


def test_an_outcome_needs_its_controls() -> None:
    shown, not_shown, against = Verdict.shown, Verdict.not_shown, Verdict.contradicted
    assert outcome(shown, shown).verdict is shown
    assert outcome(shown, not_shown).verdict is not_shown
    assert outcome(shown, against).verdict is against
    assert outcome(shown, against, control=not_shown).verdict is not_shown
    assert outcome(shown, control=not_shown).verdict is not_shown


def test_the_record_of_an_experiment(tmp_path: Path) -> None:
    plot = Plot("t", "x", "y", [Curve("a", [1, 2, 4], [[1, 2, 3], [2, 3, 4]])], log_x=True)
    result = Outcome([reaches("it | works", "table 1", "accuracy", [1.0, 1.0], 0.9)], [{"n": 1, "y": 0.5}], plot)
    experiment = Experiment("F1", "transformer", "It works", lambda lab: result)
    write(tmp_path, experiment, result, full=False, seeds=2, seconds=1.0)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["verdict"] == "shown" and data["findings"][0]["ours"].startswith("accuracy 1.000")
    assert "| 1 | 0.5 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_every_experiment_belongs_to_a_paper_of_its_row() -> None:
    papers = {paper.id: paper for paper in load().papers}
    for row, experiment in experiments().items():
        assert row in papers[experiment.paper].rows, (row, experiment.paper)
        assert find(row) is find(experiment.paper) is experiment


def test_bad_input() -> None:
    run = CliRunner().invoke(app, ["reproduce", "E1444"])
    assert isinstance(run.exception, ValueError) and "did you mean 'E14'" in str(run.exception)
    with pytest.raises(ValueError, match="at least 2"):
        Lab(Path("nowhere"), seeds=1)


def test_the_list(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["reproduce", "--out", str(tmp_path), "--json"])
    assert {e["id"] for e in json.loads(run.stdout)} == set(experiments())

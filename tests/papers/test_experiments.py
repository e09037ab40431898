"""Every experiment runs from end to end, in miniature: two updates of each training, two seeds, any verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from landmark.cli.main import app
from landmark.papers.experiment import Verdict, alike, experiments
from landmark.papers.lab import Lab
from landmark.papers.report import write


@pytest.mark.parametrize("row", experiments())
def test_it_runs(row: str, tmp_path: Path) -> None:
    experiment = experiments()[row]
    outcome = experiment.run(Lab(tmp_path, quick=True, seeds=2, quiet=True))
    write(tmp_path, experiment, outcome, seeds=2)
    assert any(f.control for f in outcome.findings), "without a control an experiment cannot tell what it is meant to"
    assert any(not f.control for f in outcome.findings)
    assert all(f.claim and f.source and f.ours for f in outcome.findings)
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] in set(Verdict)


def test_a_quick_run_is_kept_apart_and_says_so(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["reproduce", "E5", "--quick", "--seeds", "2", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.exception
    assert "verdicts say nothing" in run.stdout
    assert json.loads((tmp_path / "E5-quick" / "report.json").read_text())["quick"] is True
    assert not (tmp_path / "E5").exists()


def test_full_and_quick_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose one"):
        Lab(tmp_path, full=True, quick=True)


def test_alike() -> None:
    one = [0.990, 0.992, 0.991, 0.989, 0.990]
    assert alike("", "", "", one, [0.991, 0.990, 0.992, 0.990, 0.989], 0.01).verdict is Verdict.shown
    assert alike("", "", "", one, [x - 0.1 for x in one], 0.01).verdict is Verdict.contradicted
    assert alike("", "", "", one, [0.90, 0.99, 1.0, 0.95, 0.99], 0.01).verdict is Verdict.not_shown

"""The load generator: what it sends is what it says, and its times add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from landmark.cli.main import app
from landmark.serve.load import Load, Timing, summary

from .conftest import Live


def test_prompts_and_arrivals() -> None:
    load = Load(requests=500, rate=10, prompt=12, shared=5)
    prompts = load.prompts(50)
    assert len({tuple(p[:5]) for p in prompts}) == 1 and len({tuple(p) for p in prompts}) == 500
    assert all(len(p) == 12 and max(p) < 50 for p in prompts) and prompts == load.prompts(50)
    times = load.arrivals()
    assert times == sorted(times) and 40 < times[-1] < 60
    assert Load(rate=float("inf"), requests=3).arrivals() == [0, 0, 0]


def test_the_summary() -> None:
    timings = [Timing(0.0, [0.1, 0.2, 0.4]), Timing(1.0, [0.3, 0.4]), Timing(0.5, [], "503: no")]
    report = summary(Load(requests=3), timings)
    assert report["finished"] == 2 and report["failed"] == 1 and report["errors"] == ["503: no"]
    assert report["seconds"] == 1.4 and report["tokens_per_s"] == pytest.approx(5 / 1.4)
    assert report["time_to_first_token_ms"]["p50"] == pytest.approx(200)
    assert report["time_between_tokens_ms"]["max"] == pytest.approx(200)


def test_the_command(tiny: Live, tmp_path: Path) -> None:
    arguments = ["bench", "serve", tiny.url, "--requests", "6", "--rate", "inf", "--prompt", "20", "--shared", "8"]
    run = CliRunner().invoke(app, [*arguments, "--answer", "5", "--vocab", "90", "--out", str(tmp_path), "--json"])
    report = json.loads(run.stdout)
    assert report["finished"] == 6 and report["failed"] == 0
    assert report["tokens_per_s"] == pytest.approx(30 / report["seconds"])
    assert json.loads((tmp_path / "load.json").read_text()) == report and (tmp_path / "load.png").stat().st_size > 1000


def test_where_nothing_is_answered(tiny: Live) -> None:
    """The address may be a client's; a run of nothing but errors has failed."""
    near = [tiny.url + "/v1/", tiny.url.removeprefix("http://")]
    for url in near:
        run = CliRunner().invoke(
            app, ["bench", "serve", url, "--requests", "2", "--rate", "inf", "--vocab", "99999999"]
        )
        assert run.exit_code == 1 and "0 finished, 2 failed" in run.stdout


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="shared is 9"):
        Load(prompt=8, shared=9)
    run = CliRunner().invoke(app, ["bench", "serve", "http://127.0.0.1:9"])
    assert isinstance(run.exception, ValueError) and "landmark serve MODEL starts one" in str(run.exception)

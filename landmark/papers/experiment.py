"""What an experiment is: claims of a paper, each beside what came out here, with a verdict that follows from numbers.

    EXPERIMENT = Experiment("F4", "albert", "Sentence order is harder to tell than next sentences", run)

    def run(lab: Lab) -> Outcome:
        cells = lab.grid(train_one, [{"variant": v, "seed": s} for v in ("nsp", "sop") for s in lab.seeds])
        ...
        return Outcome([at_least("...", "sec. 4.6, table 5", "accuracy", ours, theirs)])

Every file of `landmark.papers.experiments` holds one. `landmark reproduce ID` runs it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import nearest

if TYPE_CHECKING:
    from .lab import Lab


class Verdict(StrEnum):
    shown = "shown"
    not_shown = "not shown at this scale"
    contradicted = "contradicted"


@dataclass(frozen=True)
class Finding:
    """One claim (what the paper says, in our words, and where), what came out here, and the verdict.

    A `control` is a claim of ours, such as "without the mechanism the task is not learned": where it is not shown, the
    experiment cannot tell what it is meant to tell.
    """

    claim: str
    source: str
    ours: str
    verdict: Verdict
    control: bool = False


@dataclass(frozen=True)
class Curve:
    """A line of the plot: `values` [seeds][points] over `x` [points], drawn as mean and range."""

    name: str
    x: Sequence[float]
    values: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Plot:
    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Outcome:
    """`table` is what the findings rest on: rows of names and numbers, all with the same keys."""

    findings: Sequence[Finding]
    table: Sequence[dict[str, Any]] = field(default_factory=list)
    plot: Plot | None = None
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """Shown if every claim and control is; contradicted if a claim is and the controls hold."""
        controls = [f.verdict for f in self.findings if f.control]
        claims = [f.verdict for f in self.findings if not f.control]
        if all(v is Verdict.shown for v in (*controls, *claims)):
            return Verdict.shown
        if Verdict.contradicted in claims and all(v is Verdict.shown for v in controls):
            return Verdict.contradicted
        return Verdict.not_shown


@dataclass(frozen=True)
class Experiment:
    """`row` is the roadmap's id, `paper` the catalogue's; `minutes` is about how long it takes on two cores."""

    row: str
    paper: str
    title: str
    run: Callable[[Lab], Outcome]
    minutes: float = 1.0


@cache
def experiments() -> dict[str, Experiment]:
    """Every experiment, by its row."""
    package = importlib.import_module(f"{__package__}.experiments")
    found: dict[str, Experiment] = {}
    for module in pkgutil.iter_modules(package.__path__):
        experiment: Experiment = importlib.import_module(f"{package.__name__}.{module.name}").EXPERIMENT
        if experiment.row in found:
            raise ValueError(f"{experiment.row} has two experiments: {module.name} and that of its paper")
        found[experiment.row] = experiment
    return dict(sorted(found.items(), key=lambda item: (item[0][0], int(item[0][1:]))))


def find(name: str) -> Experiment:
    """By row ("A2"), paper ("mamba") or number on arXiv. Raises ValueError with the nearest name."""
    from .catalogue import load

    known = experiments()
    papers = {paper.id: paper for paper in load().papers}
    for experiment in known.values():
        if name.lower() in (experiment.row.lower(), experiment.paper):
            return experiment
        if name[:4].isdigit() and name in papers[experiment.paper].url:
            return experiment
    names = [*known, *(e.paper for e in known.values())]
    raise ValueError(f"there is no experiment {name!r}{nearest(name, names)}; `landmark reproduce` lists them")


# Verdicts ------------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and the ends of its t-interval."""
    from scipy import stats

    x = np.asarray(values, dtype=float)
    mean = float(x.mean())
    if len(x) < 2:
        raise ValueError("an interval needs at least two values")
    error = float(stats.sem(x))
    if error == 0.0:
        return mean, mean, mean
    low, high = stats.t.interval(level, len(x) - 1, mean, error)
    return mean, float(low), float(high)


def exceeds(
    claim: str, source: str, what: str, more: Sequence[float], less: Sequence[float], *, by: float = 0.0,
    control: bool = False, digits: int = 3,
) -> Finding:  # fmt: skip
    """`more` exceeds `less` (one value a seed each, paired) by more than `by`: the 95% interval of the mean difference
    decides; it contradicts where all of it is below zero."""
    a, b = np.asarray(more, dtype=float), np.asarray(less, dtype=float)
    mean, low, high = interval(a - b)
    verdict = Verdict.shown if low > by else Verdict.contradicted if high < 0 else Verdict.not_shown
    ours = (
        f"{what} {a.mean():.{digits}f} against {b.mean():.{digits}f}; difference {mean:+.{digits}f} "
        f"[{low:+.{digits}f}, {high:+.{digits}f}], {len(a)} seeds"
    )
    return Finding(claim, source, ours, verdict, control)


def reaches(
    claim: str, source: str, what: str, values: Sequence[float], least: float, *, control: bool = False,
    digits: int = 3,
) -> Finding:  # fmt: skip
    """The mean over seeds is at least `least`."""
    x = np.asarray(values, dtype=float)
    verdict = Verdict.shown if x.mean() >= least else Verdict.not_shown
    ours = f"{what} {x.mean():.{digits}f} (worst {x.min():.{digits}f}, {len(x)} seeds); needed {least:g}"
    return Finding(claim, source, ours, verdict, control)


def stays_below(
    claim: str, source: str, what: str, values: Sequence[float], most: float, *, control: bool = False,
    digits: int = 3,
) -> Finding:  # fmt: skip
    """The mean over seeds is at most `most`."""
    x = np.asarray(values, dtype=float)
    verdict = Verdict.shown if x.mean() <= most else Verdict.not_shown
    ours = f"{what} {x.mean():.{digits}f} (highest {x.max():.{digits}f}, {len(x)} seeds); allowed {most:g}"
    return Finding(claim, source, ours, verdict, control)


def alike(
    claim: str, source: str, what: str, one: Sequence[float], other: Sequence[float], within: float, *,
    control: bool = False, digits: int = 3,
) -> Finding:  # fmt: skip
    """Two variants (one value a seed each, paired) differ by less than `within`: the 95% interval of the mean
    difference lies inside; it contradicts where all of it lies outside."""
    a, b = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    mean, low, high = interval(a - b)
    inside, outside = -within < low and high < within, low > within or high < -within
    verdict = Verdict.shown if inside else Verdict.contradicted if outside else Verdict.not_shown
    ours = (
        f"{what} {a.mean():.{digits}f} and {b.mean():.{digits}f}; difference {mean:+.{digits}f} "
        f"[{low:+.{digits}f}, {high:+.{digits}f}], {len(a)} seeds; allowed ±{within:g}"
    )
    return Finding(claim, source, ours, verdict, control)


def equal(claim: str, source: str, what: str, error: float, tolerance: float, *, control: bool = False) -> Finding:
    """An exact equality: the relative error is rounding alone."""
    verdict = Verdict.shown if error <= tolerance else Verdict.contradicted
    return Finding(claim, source, f"{what}: relative error {error:.1e} (allowed {tolerance:.0e})", verdict, control)

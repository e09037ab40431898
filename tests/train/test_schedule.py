"""Schedules against their formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from landmark.train import WSD, Constant, Cosine, InverseSqrt, Linear

ALL = [Constant(warmup=10), Linear(warmup=10), Cosine(warmup=10), WSD(warmup=10), InverseSqrt(warmup=10)]


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.type_name)
def test_warms_up_in_a_line_to_the_peak(schedule) -> None:
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(factors[9:]))


def test_ends() -> None:
    assert Cosine(warmup=5, final=0.1).factor(99, 100) == pytest.approx(0.1)
    assert Linear(warmup=5, final=0.0).factor(99, 100) == 0.0
    assert Constant().factor(99, 100) == 1.0
    assert WSD(decay=0.2, final=0.05).factor(99, 100) == pytest.approx(0.05)


def test_cosine_halfway() -> None:
    assert Cosine(final=0.2).factor(50, 101) == pytest.approx(0.6)


def test_wsd_is_stable_then_falls() -> None:
    for shape, half in (("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5))):
        schedule = WSD(warmup=3, decay=0.2, shape=shape)
        assert all(schedule.factor(step, 101) == 1.0 for step in range(3, 81))
        assert schedule.factor(90, 101) == pytest.approx(half)


def test_inverse_sqrt_is_the_noam_formula() -> None:
    """Vaswani et al. 2017, eq. 3, with the base model's 512 and 4000."""
    schedule = InverseSqrt(warmup=4000, dim=512)
    for step in (1, 100, 4000, 100_000):
        assert schedule.factor(step - 1, 0) == pytest.approx(512**-0.5 * min(step**-0.5, step * 4000**-1.5))
    assert InverseSqrt(warmup=4000).factor(3999, 0) == pytest.approx(1.0)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert all(s(warmup=0).factor(0, 10) == pytest.approx(1.0) for s in (Constant, Linear, Cosine, WSD))


@pytest.mark.parametrize("bad", [{"final": 1.5}, {"final": -0.1}, {"warmup": -1}, {"decay": 2.0}])
def test_bad_values(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"WSD.{next(iter(bad))} is"):
        WSD(**bad)

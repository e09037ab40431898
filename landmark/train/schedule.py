"""Learning-rate schedules: pure functions from the number of an update to a factor of the peak learning rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

from ..config import Config, at_least


class Schedule(Config, ABC, abstract=True):
    """`warmup` updates of linear rise, then what the subclass says."""

    warmup: int = at_least(0, default=0)

    def check(self) -> None:
        super().check()
        for name in ("final", "decay"):
            value = getattr(self, name, 0.0)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{self.type_name}.{name} is {value!r}; it must be between 0 and 1")

    def factor(self, step: int, steps: int) -> float:
        """The factor of update `step` (the first is 0) of `steps`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.after(step, steps)

    @abstractmethod
    def after(self, step: int, steps: int) -> float:
        """The factor of an update after the warm-up."""

    def progress(self, step: int, steps: int) -> float:
        """0 at the end of the warm-up, 1 at the last update."""
        return min(1.0, (step - self.warmup) / max(1, steps - 1 - self.warmup))


class Constant(Schedule):
    """Stays at the peak."""

    def after(self, step: int, steps: int) -> float:
        return 1.0


class Linear(Schedule):
    """Falls in a line to `final` at the last update."""

    final: float = 0.0

    def after(self, step: int, steps: int) -> float:
        return 1.0 + (self.final - 1.0) * self.progress(step, steps)


class Cosine(Schedule):
    """Falls along half a cosine to `final` at the last update (Loshchilov & Hutter 2017, eq. 5, without restarts)."""

    final: float = 0.1

    def after(self, step: int, steps: int) -> float:
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * self.progress(step, steps)))


class InverseSqrt(Schedule):
    """min(s^-0.5, s * warmup^-1.5) for s = 1, 2, ... (Vaswani et al. 2017, eq. 3).

    Scaled to a peak of 1; with `dim` it is the paper's dim^-0.5 min(...), to go with a learning rate of 1.
    """

    warmup: int = 4000
    dim: int | None = None

    def factor(self, step: int, steps: int) -> float:
        s = step + 1
        scale = self.warmup**0.5 if self.dim is None else self.dim**-0.5
        return scale * min(s**-0.5, s * self.warmup**-1.5)

    def after(self, step: int, steps: int) -> float:
        return self.factor(step, steps)


class WSD(Schedule):
    """Warm-up, stable, decay: the peak until the last `decay` of all updates, then down to `final` (Hu et al. 2024).

    `shape` "sqrt" falls as 1 - sqrt(progress), which ends lower than a line (Hägele et al. 2024, sec. 3.2).
    """

    decay: float = 0.2
    final: float = 0.0
    shape: Literal["linear", "sqrt"] = "sqrt"

    def after(self, step: int, steps: int) -> float:
        length = max(1, round(self.decay * steps))
        progress = max(0.0, (step - (steps - 1 - length)) / length)
        if progress == 0.0:
            return 1.0
        fall = min(1.0, math.sqrt(progress) if self.shape == "sqrt" else progress)
        return 1.0 + (self.final - 1.0) * fall

"""What a training run is: typed settings with defaults, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..config import Config, at_least, flatten, to_dict
from .optim import AdamW, OptimizerConfig
from .schedule import Cosine, Schedule

# Settings that a run may change when it goes on.
FREE = ("evaluation", "checkpoints", "peak_flops", "device", "parallel", "recompute", "compile", "out")


class Checkpoints(Config):
    """Written every so many updates (None: at the end only); the last `keep` stay, and the `best` on held-out text."""

    every: int | None = 500
    keep: int = 2
    best: bool = False


class Evaluation(Config):
    """On at most `batches` held-out batches, every so many updates (None: at the end only)."""

    every: int | None = 250
    batches: int = 16
    prompts: tuple[str, ...] = ()  # to be continued, by as many tokens, at every evaluation
    tokens: int = 48


class Settings(Config):
    """How to train: what the loop needs to know besides a model, an objective and data."""

    steps: int
    accumulate: int = 1  # micro-batches an update
    dtype: Literal["float32", "bfloat16"] = "float32"
    optimizer: OptimizerConfig = AdamW.Config()
    schedule: Schedule = Cosine(warmup=100)
    clip: float | None = 1.0  # the largest global gradient norm
    seed: int = at_least(0, default=0)
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    recompute: bool = False  # activation checkpointing: each block's inside is computed again in backward
    compile: bool = False  # blocks, by torch.compile: a minute at first, and on processors little gained (LOG.md)
    parallel: Literal["ddp", "fsdp"] = "ddp"  # with several processes
    peak_flops: float | None = None  # per process, for MFU; None: measured
    device: str | None = None

    def check(self) -> None:
        super().check()
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip!r}; it must be positive, or left out for no clipping")
        if self.recompute and self.compile:
            raise ValueError("recompute and compile do not go together: what recomputes is not compiled; choose one")
        if self.schedule.warmup > self.steps:
            raise ValueError(
                f"schedule.warmup is {self.schedule.warmup}, but the run has only {self.steps} steps; choose fewer"
            )

    def check_same(self, saved: Mapping[str, Any], step: int) -> None:
        """Raise ValueError, naming the key, if a run that was saved at `step` with other settings cannot go on.

        What only decides where, how fast and when to report may change; so may `steps`, where the schedule's past
        does not depend on it.
        """
        old, new = flatten(saved), flatten(to_dict(self))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) == new.get(key) or key.startswith(FREE):
                continue
            if key == "steps" and all(
                self.schedule.factor(s, old[key]) == self.schedule.factor(s, self.steps) for s in range(step)
            ):
                continue
            raise ValueError(
                f"the run was begun with {key} = {old.get(key)!r}, and cannot go on with {new.get(key)!r}; "
                "set it back, or start another run"
            )

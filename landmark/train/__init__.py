"""Training: the loop, optimisers, schedules, checkpoints and metrics.

`fit` trains a model that stands on batches that stand; `train` makes all of it from a `TrainConfig`, or from its keys.
The package itself can be called like `train`: `landmark.train(out="runs/first", steps=100)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .checkpoint import export
from .config import Checkpoints, Evaluation, Settings
from .interrupt import Interrupted
from .loop import Callback, Diverged, Run, fit
from .optim import Adafactor, AdamW, Lion, Muon
from .recipe import TrainConfig
from .run import train
from .schedule import WSD, Constant, Cosine, InverseSqrt, Linear

__all__ = [
    "WSD", "Adafactor", "AdamW", "Callback", "Checkpoints", "Constant", "Cosine", "Diverged", "Evaluation",
    "Interrupted", "InverseSqrt", "Linear", "Lion", "Muon", "Run", "Settings", "TrainConfig", "export", "fit", "train",
]  # fmt: skip


class _Callable(ModuleType):
    def __call__(self, *args: Any, **keys: Any) -> Run:
        return train(*args, **keys)


sys.modules[__name__].__class__ = _Callable

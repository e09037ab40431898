"""Training: the loop, optimisers, schedules, checkpoints and metrics.

`fit` trains a model that stands on batches that stand; `train` builds all of it from a `TrainConfig` or its keywords,
and is also what this package itself does when it is called: `landmark.train(steps=100, ...)`.
"""

from __future__ import annotations

from .checkpoint import export
from .config import Checkpoints, Evaluation, Settings
from .interrupt import Interrupted
from .loop import Callback, Diverged, Run, fit
from .optim import Adafactor, AdamW, Lion, Muon
from .schedule import WSD, Constant, Cosine, InverseSqrt, Linear

__all__ = [
    "WSD", "Adafactor", "AdamW", "Callback", "Checkpoints", "Constant", "Cosine", "Diverged", "Evaluation",
    "Interrupted", "InverseSqrt", "Linear", "Lion", "Muon", "Run", "Settings", "export", "fit",
]  # fmt: skip

"""From a description to a trained model: `train` builds tokenizer, data and model, and calls the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.base import Model
from ..parallel.world import world
from ..weights.tokenizer import Tokenizer
from .loop import Callback, Run, fit
from .prepare import Prepared
from .read import parse
from .recipe import TrainConfig
from .task import Task


def train(
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    sample: Callable[[Model, Tokenizer], list[str]] | None = None,
    resume: bool = False,
    **keys: Any,
) -> Run:
    """Train as `config` or `keys` say (the same keys as in TOML) and return the finished run; `run.model` is the model.

    `out` becomes a model directory with its tokenizer, and holds metrics.jsonl, prepared/ (the tokenised text) and
    checkpoints/ besides. `sample` gives texts to show at every evaluation. Raises what `fit` raises, and ValueError,
    naming key and value, for whatever in the description cannot work.
    """
    if not isinstance(config, TrainConfig):
        config = parse(TrainConfig, {**(config or {}), **keys})
    elif keys:
        raise ValueError(f"give a config or keys, not both ({', '.join(keys)})")
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a run needs a directory of its own")
    with world(config.device) as here:
        prepared = Prepared(config, out)
        if here.first:
            prepared.make()
        here.barrier()
        torch.manual_seed(config.seed)
        task = Task(config, prepared)
        show = None if sample is None else lambda model: sample(model, prepared.tokenizer)
        return fit(
            task.model, task.objective, task.batches(here), config, out=out, held_out=task.held_out(), sample=show,
            callbacks=callbacks, resume=resume,
        )  # fmt: skip

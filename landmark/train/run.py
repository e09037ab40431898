"""From a description to a trained model: `train` builds tokenizer, data and model, and calls the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.base import Model
from ..parallel.world import world
from ..weights.checkpoint import describe
from ..weights.tokenizer import Tokenizer
from .loop import Callback, Run, fit
from .model import fitting_model
from .prepare import Prepared, begun
from .read import parse
from .recipe import TrainConfig


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
    out = Path(config.out).expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a run needs a directory of its own")
    if (out / "config.json").exists() and not begun(out):
        raise ValueError(f"{out} holds a model, and no run; choose another directory, for a run would replace it")
    if isinstance(config.model, str):
        describe(config.model)  # before a tokenizer is trained for a model that there is not
    with world(config.device) as here:
        prepared = Prepared(config, out)
        if here.first:
            prepared.make()
        here.barrier()
        torch.manual_seed(config.seed)
        if config.data.rows % here.size:
            raise ValueError(
                f"data.rows is {config.data.rows}, which {here.size} processes cannot share; choose a multiple"
            )
        model, pipeline = fitting_model(config, prepared), prepared.pipeline
        show = None if sample is None or not config.objective.writes else lambda m: sample(m, prepared.tokenizer)
        return fit(
            model, config.objective.build(), pipeline.batches(model, here), config, out=out,
            held_out=pipeline.held_out(model), resume=resume, callbacks=callbacks,
            sample=show,
        )  # fmt: skip

"""From a description to a trained model: `train` builds tokenizer, data and model, and calls the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.base import Model, Origin
from ..models.inspect import longest_text
from ..nn.embedding import Embedding
from ..parallel.world import world
from ..weights.checkpoint import NATIVE
from ..weights.tokenizer import Tokenizer
from .loop import Callback, Run, fit
from .prepare import Prepared
from .read import parse
from .recipe import TrainConfig
from .task import make_model


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


def fitting_model(config: TrainConfig, prepared: Prepared) -> Model:
    """The model to train, its weights drawn from torch's generator where they are new.

    Raises ValueError where it does not fit the objective, the tokenizer or the length of the rows.
    """
    spec = config.model or config.objective.small()
    model = prepared.pipeline.adapt(make_model(spec, prepared.tokenizer))
    published = model.origin.hf if model.origin else {"architectures": [NATIVE]}
    model.origin = Origin(published, prepared.folder / "tokenizer")
    vocab, context = min(m.cfg.vocab for m in model.modules() if isinstance(m, Embedding)), longest_text(model)
    if vocab < prepared.tokenizer.vocab_size:
        raise ValueError(f"the model's vocabulary has {vocab} tokens, the tokenizer {prepared.tokenizer.vocab_size}")
    if context is not None and config.data.length > context:
        raise ValueError(f"data.length is {config.data.length}, but the model was made for {context} tokens at most")
    return model

"""What a published model's own files say about generation: generation_config.json, else config.json."""

from __future__ import annotations

import math
from typing import Any

from ..models.base import Model
from ..weights.files import read_object
from ..weights.tokenizer import Tokenizer
from .sampling import Sampling

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def generation_config(model: Model) -> dict[str, Any]:
    """The values of both files, the first one's before the second's; {} for a model that was built here."""
    if model.origin is None:
        return {}
    path = model.origin.directory / "generation_config.json" if model.origin.directory else None
    own = read_object(path) if path is not None and path.exists() else {}
    return dict(model.origin.hf) | {key: value for key, value in own.items() if value is not None}


def stop_ids(model: Model, tokenizer: Tokenizer | None = None) -> tuple[int, ...]:
    """The ids that end an answer: the model's `eos_token_id`, or else the tokenizer's."""
    ids = generation_config(model).get("eos_token_id")
    if ids is None:
        ids = None if tokenizer is None else tokenizer.eos_id
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def recommended(model: Model, **changes: Any) -> Sampling:
    """The sampling that the model's files ask for, with changes (None: no change)."""
    config = generation_config(model)
    values: dict[str, Any] = {}
    if config.get("do_sample"):
        values = {key: config[key] for key in SETTINGS if config.get(key) is not None}
    banned = [words[0] for words in config.get("bad_words_ids") or () if len(words) == 1]
    if banned:
        values["logit_bias"] = dict.fromkeys(banned, -math.inf)
    return Sampling(**values | {key: value for key, value in changes.items() if value is not None})

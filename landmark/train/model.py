"""The model of a run, new or to go on from, and whether it fits what it is to learn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..models.base import Model, Origin
from ..models.inspect import longest_text
from ..models.pattern import is_pattern
from ..nn.bitlinear import PackedBitLinear
from ..nn.codes import Codes
from ..nn.embedding import Embedding
from ..transforms.bitnet import bitnet
from ..weights.checkpoint import NATIVE, build, describe, load, own_config
from ..weights.tokenizer import Tokenizer
from .prepare import Prepared, is_fresh
from .recipe import TrainConfig


def fitting_model(config: TrainConfig, prepared: Prepared) -> Model:
    """The model to train, its weights drawn from torch's generator where they are new.

    Raises ValueError where it does not fit the objective, the tokenizer or the length of the rows.
    """
    spec = config.model or config.objective.small()
    model = prepared.pipeline.adapt(make_model(spec, prepared.tokenizer))
    if any(isinstance(module, Codes | PackedBitLinear) for module in model.modules()):
        raise ValueError(
            f"the weights of {config.model} are codes, which are used and not trained; give the model they were made of"
        )
    if config.linear is not None:
        model = bitnet(model, config.linear)
    published = model.origin.hf if model.origin else {"architectures": [NATIVE]}
    model.origin = Origin(published, prepared.folder / "tokenizer")
    vocab, context = min(m.cfg.vocab for m in model.modules() if isinstance(m, Embedding)), longest_text(model)
    if vocab < prepared.tokenizer.vocab_size:
        raise ValueError(f"the model's vocabulary has {vocab} tokens, the tokenizer {prepared.tokenizer.vocab_size}")
    if context is not None and config.data.length > context:
        raise ValueError(f"data.length is {config.data.length}, but the model was made for {context} tokens at most")
    return model


def make_model(spec: str | Mapping[str, Any], tokenizer: Tokenizer) -> Model:
    """A new model, or one to go on from; see `TrainConfig`. A config.json as a table gets the tokenizer's vocabulary
    and special tokens where it does not name them."""
    if isinstance(spec, str) and is_pattern(spec) and not Path(spec).exists():
        spec = {"type": "Pattern", "pattern": spec}
    if isinstance(spec, str):
        return build(describe(spec)[1]) if is_fresh(spec) else load(spec)
    if "type" not in spec:
        ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
        known = {name: value for name, value in ids.items() if value is not None}
        return build({"vocab_size": tokenizer.vocab_size, **known, **spec})
    if spec["type"] == "Pattern":
        spec = {"vocab_size": tokenizer.vocab_size, **spec}
    model: nn.Module = own_config(spec).build()
    assert isinstance(model, Model)
    return model

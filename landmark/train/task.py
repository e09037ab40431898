"""The parts of a run that belong together: an objective, a model of its kind, and batches in its form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from torch import nn

from ..config import ModelConfig, from_dict
from ..data.batches import Batches
from ..data.masking import MaskedBatches, Masking
from ..data.pairs import Seq2SeqBatches
from ..models.base import Model, Origin
from ..models.decoder import Decoder
from ..models.encoder import Encoder
from ..models.encoder_decoder import EncoderDecoder
from ..models.inspect import longest_text
from ..nn.embedding import Embedding
from ..objectives.base import Objective
from ..objectives.lm import CausalLM
from ..objectives.mlm import MaskedLM
from ..objectives.seq2seq import Seq2Seq
from ..parallel.world import World
from ..weights.checkpoint import NATIVE, build, describe, load
from ..weights.tokenizer import Tokenizer
from . import loop
from .prepare import Prepared, is_fresh
from .recipe import Causal, Masked, Seq2seq, TrainConfig


class Task:
    """Made from a description and what was prepared for it. Raises ValueError for parts that do not fit together."""

    def __init__(self, config: TrainConfig, prepared: Prepared) -> None:
        self.config, self.data, self.prepared, self.tokenizer = config, config.data, prepared, prepared.tokenizer
        self.model = self._model()
        if isinstance(config.objective, Seq2seq) and len(self.data.corpora) > 1:
            raise ValueError("parallel text is one corpus, not a mixture; give data.corpus alone")

    @property
    def objective(self) -> Objective:
        match self.config.objective:
            case Causal(z_loss=z_loss, label_smoothing=smoothing):
                return CausalLM(z_loss, smoothing)
            case Seq2seq(label_smoothing=smoothing):
                return Seq2Seq(smoothing)
            case _:
                return MaskedLM()

    def batches(self, here: World) -> loop.Batches:
        """This process's part of the training batches."""
        d, seed, rank = self.data, self.config.seed, here.rank
        if d.rows % here.size:
            raise ValueError(f"data.rows is {d.rows}, which {here.size} processes cannot share; choose a multiple")
        if isinstance(self.model, EncoderDecoder):
            return self._pairs("train", seed=seed, epochs=d.epochs, rank=rank, world=here.size)
        rows = Batches(
            self.prepared.sources("train"),
            d.rows,
            d.length,
            seed=seed,
            epochs=d.epochs,
            packing=d.packing,
            rank=rank,
            world=here.size,
        )
        masking = self._masking()
        return rows if masking is None else MaskedBatches(rows, masking, seed=seed, rank=rank)

    def held_out(self) -> Iterator[Any]:
        """All held-out text once, in order and with the same tokens hidden; the same in every process."""
        sources = self.prepared.sources("held-out")
        if isinstance(self.model, EncoderDecoder):
            yield from self._pairs("held-out", shuffle=False, epochs=1) if sources else ()
            return
        masking, number = self._masking(), count()
        for source in sources:
            for batch in Batches(source.shards, self.data.rows, self.data.length, shuffle=False, epochs=1):
                yield batch if masking is None else masking(batch, next(number))

    def _pairs(self, part: str, **options: Any) -> Seq2SeqBatches:
        assert isinstance(self.model, EncoderDecoder)
        (source,), (target,) = (self.prepared.sources(part, side) for side in self.prepared.sides)
        longest, start = self.data.length, self.model.cfg.start
        return Seq2SeqBatches(
            source.shards, target.shards, self.data.rows * longest, longest=longest, start=start, **options
        )

    def _masking(self) -> Masking | None:
        o = self.config.objective
        if not isinstance(o, Masked):
            return None
        return Masking.of(self.tokenizer, whole_words=o.whole_words, probability=o.probability, span=o.span)

    def _model(self) -> Model:
        """The model to train, its weights drawn from torch's generator where they are new."""
        model, objective = make_model(self.config.model, self.tokenizer), self.config.objective
        kind = {Causal: Decoder, Masked: Encoder, Seq2seq: EncoderDecoder}[type(objective)]
        if not isinstance(model, kind):
            names = {Decoder: "a decoder", Encoder: "an encoder", EncoderDecoder: "an encoder-decoder"}
            raise ValueError(
                f"the objective {objective.type_name} trains {names[kind]}, but [model] is {names[type(model)]}"
            )
        published = model.origin.hf if model.origin else {"architectures": [NATIVE]}
        model.origin = Origin(published, self.prepared.folder / "tokenizer")
        vocab = min(m.cfg.vocab for m in model.modules() if isinstance(m, Embedding))
        if vocab < self.tokenizer.vocab_size:
            raise ValueError(f"the model's vocabulary has {vocab} tokens, the tokenizer {self.tokenizer.vocab_size}")
        context = longest_text(model)
        if context is not None and self.data.length > context:
            raise ValueError(f"data.length is {self.data.length}, but the model was made for {context} tokens at most")
        return model


def make_model(spec: str | Mapping[str, Any], tokenizer: Tokenizer) -> Model:
    """A new model, or one to go on from; see `TrainConfig`. A config.json as a table gets the tokenizer's vocabulary
    and special tokens where it does not name them."""
    if isinstance(spec, str):
        return build(describe(spec)[1]) if is_fresh(spec) else load(spec)
    if "type" not in spec:
        ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
        known = {name: value for name, value in ids.items() if value is not None}
        return build({"vocab_size": tokenizer.vocab_size, **known, **spec})
    config = from_dict(spec)
    if not isinstance(config, ModelConfig):
        raise ValueError(f"[model] describes a {spec['type']}, which is a part; give a whole model")
    model: nn.Module = config.build()
    assert isinstance(model, Model)
    return model

"""A target text from its source, by an encoder-decoder: the 2017 Transformer and Marian."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ...data.pairs import Seq2SeqBatch, Seq2SeqBatches
from ...models.base import Model
from ...models.encoder_decoder import EncoderDecoder
from ...objectives import seq2seq
from ...parallel.world import World
from ...weights.tokenizer import Tokenizer
from ...weights.tokenizer_formats import wrap
from ...weights.tokenizer_train import DEFAULT_SPECIAL, Kind, train_tokenizer
from .. import loop
from .base import ObjectiveConfig
from .causal import Corpora

if TYPE_CHECKING:
    from ..prepare import Prepared

SMALL = {  # about 6 M parameters with the default tokenizer
    "architectures": ["MarianMTModel"], "model_type": "marian", "is_encoder_decoder": True, "d_model": 256,
    "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024, "activation_function": "relu", "dropout": 0.1,
    "max_position_embeddings": 512, "scale_embedding": True,
}  # fmt: skip


class Seq2Seq(ObjectiveConfig):
    """Targets from sources; `rows` x `length` tokens with padding on the longer side of a batch. Pairs with more than
    `length` tokens on a side are left out. See `objectives.seq2seq.Seq2Seq`."""

    trains: ClassVar[type[Model]] = EncoderDecoder
    writes: ClassVar[bool] = True

    label_smoothing: float = 0.1

    def check(self) -> None:
        super().check()
        self.within(0.0, 1.0, label_smoothing=self.label_smoothing)

    def build(self) -> seq2seq.Seq2Seq:
        return seq2seq.Seq2Seq(self.label_smoothing)

    def pipeline(self, prepared: Prepared) -> Parallel:
        return Parallel(self, prepared)

    def small(self) -> Mapping[str, Any]:
        return SMALL

    def train_tokenizer(self, kind: Kind, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Texts end with eos and begin with nothing: the decoder has a start of its own."""
        special = {role: name for role, name in DEFAULT_SPECIAL[kind].items() if role != "bos"}
        if "eos" not in special:
            raise ValueError(f"tokenizer.kind {kind!r} has no token that ends a text; choose bpe or unigram")
        tokenizer = train_tokenizer(kind, texts, vocab_size, special_tokens=special, extra_tokens=())
        wrap(tokenizer.backend, None, special["eos"])
        return tokenizer


class Parallel(Corpora[Seq2Seq]):
    """Both sides of parallel text as shards."""

    def write(self) -> None:
        self.prepared.write_shards("text", "target")

    def batches(self, model: Model, here: World) -> loop.Batches:
        return self.pairs(model, "train", seed=self.seed, epochs=self.data.epochs, rank=here.rank, world=here.size)

    def held_out(self, model: Model) -> Iterator[Seq2SeqBatch]:
        if self.prepared.sources("held-out"):
            yield from self.pairs(model, "held-out", shuffle=False, epochs=1)

    def pairs(self, model: Model, part: str, **options: Any) -> Seq2SeqBatches:
        assert isinstance(model, EncoderDecoder)
        sources, targets = self.prepared.sources(part), self.prepared.sources(part, "target")
        if len(sources) != 1 or sources[0].shards is targets[0].shards:
            raise ValueError("parallel text is one corpus of pairs, not a mixture and not shards; see data.corpus")
        d = self.data
        return Seq2SeqBatches(
            sources[0].shards, targets[0].shards, d.rows * d.length, longest=d.length, start=model.cfg.start, **options
        )

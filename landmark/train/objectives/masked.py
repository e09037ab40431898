"""Hidden tokens, by an encoder: BERT, RoBERTa, ALBERT, SpanBERT."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...config import nearest
from ...data.batches import Batch
from ...data.labelled import Example, LabelledBatches, sentence_pairs, sentences
from ...data.masking import MaskedBatches, Masking
from ...models.base import Model
from ...models.encoder import Encoder
from ...objectives import mlm
from ...parallel.world import World
from ...weights.tokenizer import Tokenizer
from ...weights.tokenizer_train import Kind
from .. import loop
from .base import ObjectiveConfig, Pipeline, SameData, name_of
from .causal import Corpora, Packed
from .frames import frame, framed_reader, train_framed, untyped

if TYPE_CHECKING:
    from ..prepare import Prepared

SMALL = {  # about 4 M parameters with the default tokenizer
    "model_type": "bert", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 1024, "max_position_embeddings": 512, "type_vocab_size": 2,
}  # fmt: skip


class MaskedLM(ObjectiveConfig):
    """Hidden tokens, drawn anew for every batch; see `Masking`. `pairs`: what a second head learns of two neighbouring
    segments, "nsp" (next sentence: Devlin et al. 2018) or "sop" (sentence order: Lan et al. 2019); without, rows are
    packed with documents (Liu et al. 2019). `span` is SpanBERT's 0.2."""

    kind: ClassVar[Kind] = "wordpiece"
    trains: ClassVar[type[Model]] = Encoder

    pairs: Literal["nsp", "sop"] | None = None
    probability: float = 0.15
    replaced: float = 0.8
    random: float = 0.1
    whole_words: bool = False
    span: float | None = None

    def check(self) -> None:
        super().check()
        self.within(1e-6, 1.0, probability=self.probability, span=self.span)
        self.within(0.0, 1.0 + 1e-9, replaced=self.replaced, random=self.random)
        if self.replaced + self.random > 1.0 + 1e-9:
            raise ValueError(
                f"objective.replaced is {self.replaced} and objective.random {self.random}; they are shares of the "
                "hidden tokens, 1 at most in all"
            )

    def build(self) -> mlm.MaskedLM:
        return mlm.MaskedLM()

    def pipeline(self, prepared: Prepared) -> Pipeline[MaskedLM]:
        return MaskedRows(self, prepared) if self.pairs is None else MaskedPairs(self, prepared)

    def small(self) -> Mapping[str, Any]:
        return {"architectures": ["BertForMaskedLM" if self.pairs is None else "BertForPreTraining"], **SMALL}

    def train_tokenizer(self, kind: Kind, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        return train_framed(kind, texts, vocab_size)

    def reader(self, tokenizer: Tokenizer) -> Tokenizer:
        return framed_reader(tokenizer)

    def accept(self, model: Model) -> Model:
        super().accept(model)
        assert isinstance(model, Encoder)
        for head in ("mlm", *(() if self.pairs is None else ("pair",))):
            if head not in model.heads:
                pairs = "" if self.pairs is None else f" with pairs = {self.pairs!r}"
                raise ValueError(
                    f"the objective MaskedLM{pairs} needs a head {head!r}, which {name_of(model)} does not have; its "
                    f"heads are {sorted(model.heads)}{nearest(head, model.heads)}"
                )
        return model

    def masking(self, tokenizer: Tokenizer) -> Masking:
        return Masking.of(
            tokenizer, whole_words=self.whole_words, probability=self.probability, replaced=self.replaced,
            random=self.random, span=self.span,
        )  # fmt: skip


class MaskedRows(Packed[MaskedLM]):
    """Packed documents under a mask."""

    def batches(self, model: Model, here: World) -> loop.Batches:
        return MaskedBatches(
            self.rows(here), self.objective.masking(self.prepared.tokenizer), seed=self.seed, rank=here.rank
        )

    def held_out(self, model: Model) -> Iterator[Batch]:
        masking, number = self.objective.masking(self.prepared.tokenizer), count()
        for batch in super().held_out(model):
            yield masking(batch, self.seed, next(number))


class MaskedPairs(Corpora[MaskedLM]):
    """Pairs of segments under a mask. All sentences are held in memory, and paired anew in every epoch."""

    def batches(self, model: Model, here: World) -> loop.Batches:
        pairs = self.pairs(model, "train", epochs=self.data.epochs, rank=here.rank, world=here.size)
        masked = MaskedBatches(pairs, self.masking, seed=self.seed, rank=here.rank)
        return SameData(masked, self.fingerprint)

    def held_out(self, model: Model) -> Iterator[Batch]:
        if self.corpora("held-out"):
            yield from MaskedBatches(self.pairs(model, "held-out", epochs=1), self.masking, seed=self.seed)

    @cached_property
    def masking(self) -> Masking:
        return self.objective.masking(self.prepared.tokenizer)

    def pairs(self, model: Model, part: str, *, epochs: int | None, rank: int = 0, world: int = 1) -> LabelledBatches:
        tokenizer, documents, d = self.prepared.tokenizer, self.documents(part), self.data
        cls, sep = frame(tokenizer)

        def examples(epoch: int) -> list[Example]:
            order: Literal["next", "swap"] = "next" if self.objective.pairs == "nsp" else "swap"
            pairs = sentence_pairs(documents, d.length, cls=cls, sep=sep, order=order, seed=self.seed, epoch=epoch)
            return untyped(pairs, model)

        return LabelledBatches(
            examples, d.rows, pad=tokenizer.pad_id or 0, seed=self.seed, epochs=epochs, rank=rank, world=world
        )

    def documents(self, part: str) -> list[list[list[int]]]:
        """Sentences of ids. Raises ValueError for text that is tokenised already, or weighed."""
        named = [entry for name, entry in self.prepared.parts.items() if name.startswith(part)]
        corpora = self.corpora(part)
        if len(corpora) < len(named):
            raise ValueError("pairs are made of sentences, which shards do not tell apart; give text in data.corpus")
        if len({weight for _, weight in named}) > 1:
            raise ValueError("pairs are drawn from all corpora alike; leave their weights out")
        encode = self.prepared.tokenizer.encode_batch
        return [encode(sentences(document.text), literal=True) for corpus in corpora for document in corpus]

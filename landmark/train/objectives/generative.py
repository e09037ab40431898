"""GPT-1's fine-tuning: a label at a text's end, by a decoder that models the text besides (Radford et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ...data.batches import IGNORE
from ...data.labelled import Example
from ...data.rows import Row
from ...models.base import Model
from ...models.decoder import Decoder
from ...models.encoder import Encoder, with_heads
from ...nn.heads import LastToken, SequenceHead
from ...objectives import classification
from ...weights.tokenizer import Tokenizer
from ...weights.tokenizer_train import Kind
from .base import ObjectiveConfig
from .causal import SMALL
from .labelled import Labelled, LabelledConfig
from .sequences import label_name

if TYPE_CHECKING:
    from ..prepare import Prepared


class GenerativeFineTuning(LabelledConfig):
    """Rows with a text (`data.text`), perhaps a second one (`pair` names its field), and a label. A text stands between
    bos and eos, and its label is read at the end; `weight` is that of the language model (eq. 5)."""

    kind: ClassVar[Kind] = "bpe"
    trains: ClassVar[type[Model]] = Decoder
    head: ClassVar[str] = "classify"

    weight: float = 0.5
    pair: str | None = None
    dropout: float = 0.1

    def check(self) -> None:
        super().check()
        self.within(0.0, 1e3, weight=self.weight)
        self.within(0.0, 1.0, dropout=self.dropout)

    def build(self) -> classification.GenerativeFineTuning:
        return classification.GenerativeFineTuning(self.weight, self.head)

    def small(self) -> Mapping[str, Any]:
        return SMALL

    def train_tokenizer(self, kind: Kind, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        return ObjectiveConfig.train_tokenizer(self, kind, texts, vocab_size)

    def accept(self, model: Model) -> Model:
        """A decoder, or what a run like this has made of one."""
        made = isinstance(model, Encoder) and {self.head, "lm"} <= set(model.heads)
        return model if made else super().accept(model)

    def pipeline(self, prepared: Prepared) -> LabelledTexts:
        return LabelledTexts(self, prepared)


class LabelledTexts(Labelled[GenerativeFineTuning]):
    def texts(self) -> Iterator[str]:
        for row in self.parts["train"]:
            yield from self.texts_of(row)

    def texts_of(self, row: Row) -> list[str]:
        fields = (self.data.text, self.objective.pair)
        return [row.text(field) for field in fields if field is not None]

    def names_in(self, row: Row) -> Iterable[str]:
        return [label_name(row.label(self.objective.label), row)]

    def adapt(self, model: Model) -> Model:
        model = self.objective.accept(model)
        if isinstance(model, Decoder):
            classify = SequenceHead.Config(labels=self.names, pool=LastToken(), dropout=self.objective.dropout)
            new = with_heads(model, {self.objective.head: classify, "lm": model.cfg.head}, self.objective.head)
            new.heads["lm"].load_state_dict(model.head.state_dict())
            return new
        if unknown := [name for name in self.names if name not in self.index(model)]:
            raise ValueError(f"the model's labels are {sorted(self.index(model))}; it does not know {unknown[0]!r}")
        return model

    def of_row(self, row: Row, index: Mapping[str, int]) -> list[Example]:
        tokenizer, texts = self.prepared.tokenizer, self.texts_of(row)
        begin, end = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id, tokenizer.eos_id
        if begin is None or end is None:
            raise ValueError("this tokenizer has no eos, at which a label could be read; name another")
        room = (self.data.length - 1 - len(texts)) // len(texts)
        ids = [begin]
        for part in tokenizer.encode_batch(texts, literal=True):
            ids += [*part[: max(room, 0)], end]
        if len(ids) > self.data.length:
            raise ValueError(
                f"data.length is {self.data.length}, in which a text and its frame do not fit; choose more"
            )
        (name,) = self.names_in(row)
        return [Example(ids, label=index[name], targets=[*ids[1:], IGNORE])]

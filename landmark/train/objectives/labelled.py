"""Labelled examples for fine-tuning: rows of JSON lines or Parquet, and what all objectives on them share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, TypeVar

import numpy as np

from ...config import nearest
from ...data.labelled import Example, LabelledBatch, LabelledBatches
from ...data.rows import Row, Rows
from ...models.base import Model
from ...models.encoder import Encoder, for_task
from ...nn.heads import SequenceHead, TokenHead
from ...parallel.world import World
from ...weights.tokenizer import Tokenizer
from ...weights.tokenizer_train import Kind
from .. import loop
from .base import ObjectiveConfig, Pipeline, SameData
from .frames import Framer, train_framed, untyped
from .masked import SMALL


class LabelledConfig(ObjectiveConfig, ABC, abstract=True):
    """Labels of whole texts, of tokens or of spans, by an encoder with a fresh head where it has none that knows all
    labels. `label` is the field that has them; `labels` their names in order, by default those of the data, sorted."""

    kind: ClassVar[Kind] = "wordpiece"
    trains: ClassVar[type[Model]] = Encoder
    task: ClassVar[str]  # the architecture's name after the family's
    head: ClassVar[str]

    label: str = "label"
    labels: tuple[str, ...] = ()

    def small(self) -> Mapping[str, Any]:
        return {"architectures": [f"BertFor{self.task}"], **SMALL}

    def train_tokenizer(self, kind: Kind, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        return train_framed(kind, texts, vocab_size)


class Examples(Sequence[Example]):
    """What `make` makes of rows, `each` examples of one, when it is asked for."""

    def __init__(self, rows: Rows, make: Callable[[Row], list[Example]], each: int) -> None:
        self.rows, self.make, self.each = rows, make, each

    def __len__(self) -> int:
        return len(self.rows) * self.each

    def __getitem__(self, i: Any) -> Any:
        if not isinstance(i, slice):
            return self[i : i + 1][0]
        first, last, _ = i.indices(len(self))
        found = [
            example for n in range(first // self.each, -(-last // self.each)) for example in self.make(self.rows[n])
        ]
        return found[first % self.each :][: last - first]


L_co = TypeVar("L_co", bound=LabelledConfig, covariant=True)


class Labelled(Pipeline[L_co]):
    """Rows, each an example, or `together` of them, made anew whenever a batch needs them."""

    @property
    def together(self) -> int:
        return 1

    @cached_property
    def parts(self) -> dict[str, Rows]:
        """Rows to train on and those that are held out: the ones whose content has the lowest hashes."""
        d = self.data
        if len({config.weight for config in d.corpora}) > 1:
            raise ValueError("all labelled rows are read alike; leave the weights of data.mixture out")
        rows = Rows.read([path for config in d.corpora for path in paths(config.corpus)])
        if isinstance(d.held_out, str):
            return {"train": rows, "held-out": Rows.read(paths(d.held_out))}
        held = max(1, round(d.held_out * len(rows))) if d.held_out else 0
        if held >= len(rows):
            raise ValueError(f"of {len(rows)} rows none is left to train on; give more, or set data.held_out to 0")
        chosen = np.zeros(len(rows), dtype=bool)
        if held:
            chosen = rows.digests <= np.partition(rows.digests, held - 1)[held - 1]  # equal rows lie in one part
        return {"train": rows.where(~chosen), "held-out": rows.where(chosen)}

    @property
    def rows(self) -> Iterator[Row]:
        return chain(self.parts["train"], self.parts["held-out"])

    @cached_property
    def fingerprint(self) -> list[Any]:
        return [hashlib.sha256(rows.digests.tobytes()).hexdigest()[:16] for rows in self.parts.values()]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All labels, in order."""
        found = {name for row in self.rows for name in self.names_in(row)}
        if self.objective.labels:
            for row in self.rows:
                for name in self.names_in(row):
                    if name not in self.objective.labels:
                        close = nearest(name, self.objective.labels)
                        raise ValueError(f"{row.where} has the label {name!r}{close}, which objective.labels lacks")
            return self.objective.labels
        return tuple(sorted(found, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)))

    def index(self, model: Model) -> dict[str, int]:
        """Label -> its number in the model's head."""
        assert isinstance(model, Encoder)
        head = model.head(self.objective.head)
        assert isinstance(head, SequenceHead | TokenHead)
        return {name: i for i, name in enumerate(head.cfg.labels)}

    def adapt(self, model: Model) -> Model:
        model = super().adapt(model)
        assert isinstance(model, Encoder)
        head = model.heads[self.objective.head] if self.objective.head in model.heads else None
        known = head.cfg.labels if isinstance(head, SequenceHead | TokenHead) else ()
        return model if set(self.names) <= set(known) else self.with_head(model)

    def with_head(self, model: Encoder) -> Model:
        return for_task(model, self.objective.task, self.names)

    @cached_property
    def framer(self) -> Framer:
        return Framer(self.prepared.tokenizer, self.data.length)

    def batches(self, model: Model, here: World) -> loop.Batches:
        return SameData(
            LabelledBatches(
                self.examples("train", model), self.data.rows, pad=self.prepared.tokenizer.pad_id or 0, seed=self.seed,
                epochs=self.data.epochs, together=self.together, rank=here.rank, world=here.size,
            ),
            self.fingerprint,
        )  # fmt: skip

    def held_out(self, model: Model) -> Iterator[LabelledBatch]:
        if examples := self.examples("held-out", model):
            pad = self.prepared.tokenizer.pad_id or 0
            yield from LabelledBatches(examples, self.data.rows, pad=pad, epochs=1, together=self.together)

    def examples(self, part: str, model: Model) -> Examples:
        """Raises ValueError for rows that are no examples."""
        index = self.index(model)
        made = Examples(self.parts[part], lambda row: untyped(self.of_row(row, index), model), self.together)
        for row in made.rows:
            made.make(row)
        return made

    @abstractmethod
    def names_in(self, row: Row) -> Iterable[str]:
        """The labels that a row names."""

    @abstractmethod
    def of_row(self, row: Row, index: Mapping[str, int]) -> list[Example]:
        """A row in ids: `together` examples."""


def paths(corpus: str | tuple[str, ...]) -> list[str]:
    if corpus == "embedded":
        raise ValueError("the embedded corpus has no labels; name files of JSON lines or Parquet in data.corpus")
    return [corpus] if isinstance(corpus, str) else list(corpus)

"""Labelled examples for fine-tuning: rows of JSON lines, and what all objectives on them have in common."""

from __future__ import annotations

import gzip
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from ...config import nearest
from ...data.corpora import find_files
from ...data.labelled import Example, LabelledBatch, LabelledBatches
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


@dataclass(frozen=True)
class Row:
    """One JSON object, and the file and line where it stands."""

    values: Mapping[str, Any]
    where: str

    def __getitem__(self, field: str) -> Any:
        """Raises ValueError, naming file and line, where it is absent or null."""
        value = self.values.get(field)
        if value is None:
            known = ", ".join(map(repr, self.values))
            raise ValueError(f"{self.where} has no {field!r}{nearest(field, self.values)}; it has {known or 'nothing'}")
        return value

    def text(self, field: str) -> str:
        value = self[field]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.where}: {field!r} is {value!r}; it must be a text that is not empty")
        return value

    def label(self, field: str) -> Any:
        if self.values.get(field) is None:
            raise ValueError(f"{self.where} has no label; give it {field!r}, or name its field in [objective]")
        return self.values[field]


def read_rows(paths: Sequence[str]) -> list[Row]:
    """All rows of files, folders and patterns, perhaps .gz. Raises ValueError for what is not JSON lines."""
    rows = []
    for path in find_files(paths).values():
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if line.strip():
                    try:
                        values = json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{where} is not JSON ({error}); write one JSON object a line") from None
                    if not isinstance(values, dict):
                        raise ValueError(f"{where} is no JSON object; write for instance {{'text': ..., 'label': ...}}")
                    rows.append(Row(values, where))
    if not rows:
        raise ValueError(f"{', '.join(paths)} holds no rows; write one JSON object a line")
    return rows


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


L_co = TypeVar("L_co", bound=LabelledConfig, covariant=True)


class Labelled(Pipeline[L_co]):
    """Rows, each an example, or `together` of them, all in memory."""

    @property
    def together(self) -> int:
        return 1

    @cached_property
    def parts(self) -> dict[str, list[Row]]:
        """Rows to train on and those that are held out: the ones whose content has the lowest hashes."""
        d = self.data
        if len({config.weight for config in d.corpora}) > 1:
            raise ValueError("all labelled rows are read alike; leave the weights of data.mixture out")
        rows = [row for config in d.corpora for row in read_rows(paths(config.corpus))]
        if isinstance(d.held_out, str):
            return {"train": rows, "held-out": read_rows(paths(d.held_out))}
        ranked = sorted(rows, key=content)
        held = max(1, round(d.held_out * len(rows))) if d.held_out else 0
        if held >= len(rows):
            raise ValueError(f"of {len(rows)} rows none is left to train on; give more, or set data.held_out to 0")
        lowest = {content(row) for row in ranked[:held]}  # the same row twice lies in one part
        train = [row for row in rows if content(row) not in lowest]
        return {"train": train, "held-out": [row for row in rows if content(row) in lowest]}

    @property
    def rows(self) -> list[Row]:
        return self.parts["train"] + self.parts["held-out"]

    @cached_property
    def fingerprint(self) -> list[Any]:
        digests = [hashlib.sha256("".join(map(content, rows)).encode()) for rows in self.parts.values()]
        return [digest.hexdigest()[:16] for digest in digests]

    @property
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

    def examples(self, part: str, model: Model) -> list[Example]:
        index = self.index(model)
        return untyped([example for row in self.parts[part] for example in self.of_row(row, index)], model)

    @abstractmethod
    def names_in(self, row: Row) -> Iterable[str]:
        """The labels that a row names."""

    @abstractmethod
    def of_row(self, row: Row, index: Mapping[str, int]) -> list[Example]:
        """A row in ids: `together` examples."""


def paths(corpus: str | tuple[str, ...]) -> list[str]:
    if corpus == "embedded":
        raise ValueError("the embedded corpus has no labels; name files of JSON lines in data.corpus")
    return [corpus] if isinstance(corpus, str) else list(corpus)


def content(row: Row) -> str:
    text = json.dumps(row.values, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

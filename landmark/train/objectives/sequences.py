"""Classes, truths or values of whole texts, or pairs of texts, by an encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ...data.labelled import Example
from ...data.rows import Row
from ...models.base import Model
from ...models.encoder import Encoder, for_task
from ...objectives import classification
from ...objectives.classification import ProblemType
from .labelled import Labelled, LabelledConfig

if TYPE_CHECKING:
    from ..prepare import Prepared


class SequenceClassification(LabelledConfig):
    """Rows with a text (`data.text`), perhaps a second one (`pair` names its field), and a label: a name or number, a
    list of names (multi_label_classification), a value or a list of values (regression)."""

    task: ClassVar[str] = "SequenceClassification"
    head: ClassVar[str] = "classify"

    problem: ProblemType = "single_label_classification"
    pair: str | None = None

    def build(self) -> classification.SequenceClassification:
        return classification.SequenceClassification(self.problem, self.head)

    def pipeline(self, prepared: Prepared) -> Sequences:
        return Sequences(self, prepared)


class Sequences(Labelled[SequenceClassification]):
    def texts(self) -> Iterator[str]:
        for row in self.parts["train"]:
            yield row.text(self.data.text)
            if self.objective.pair is not None:
                yield row.text(self.objective.pair)

    def names_in(self, row: Row) -> Iterable[str]:
        label, problem = row.label(self.objective.label), self.objective.problem
        if problem == "single_label_classification":
            return [label_name(label, row)]
        if problem == "multi_label_classification":
            if not isinstance(label, list):
                raise ValueError(f"{row.where}: the label is {label!r}; multi_label_classification wants a list")
            return [label_name(item, row) for item in label]
        count = len(values(label, row))
        return ["score"] if count == 1 else [f"score_{i}" for i in range(count)]

    def with_head(self, model: Encoder) -> Model:
        return for_task(model, self.objective.task, self.names, problem_type=self.objective.problem)

    def of_row(self, row: Row, index: Mapping[str, int]) -> list[Example]:
        pair = self.objective.pair
        encoded = self.framer(row.text(self.data.text), None if pair is None else row.text(pair))
        return [Example(encoded.ids, label=self.label(row, index), types=encoded.type_ids)]

    def label(self, row: Row, index: Mapping[str, int]) -> Any:
        names, problem = list(self.names_in(row)), self.objective.problem
        if problem == "single_label_classification":
            return index[names[0]]
        if problem == "multi_label_classification":
            return [float(name in names) for name in index]
        found = values(row.label(self.objective.label), row)
        if len(found) != len(index):
            raise ValueError(f"{row.where} has {len(found)} values, but others have {len(index)}")
        return found


def label_name(label: Any, row: Row) -> str:
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(f"{row.where}: the label is {label!r}; it must be a name or a whole number")
    return str(label)


def values(label: Any, row: Row) -> list[float]:
    found = label if isinstance(label, list) else [label]
    if not found or any(isinstance(value, bool) or not isinstance(value, int | float) for value in found):
        raise ValueError(f"{row.where}: the label is {label!r}; regression wants a number, or a list of them")
    return [float(value) for value in found]

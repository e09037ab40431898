"""The right one of several continuations, by an encoder: SWAG, RACE, COPA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from ...data.labelled import Example
from ...data.rows import Row
from ...models.base import Model
from ...models.encoder import Encoder, for_task
from ...objectives import classification
from .labelled import Labelled, LabelledConfig

if TYPE_CHECKING:
    from ..prepare import Prepared

SCORE = ("score",)


class MultipleChoice(LabelledConfig):
    """Rows as `landmark eval --choices` reads them: a context, a list of `choices` texts, and the answer, one of them
    or its number from 0. Each choice gets a score beside its context (Devlin et al. 2018, sec. 4.4); `data.rows` counts
    questions."""

    task: ClassVar[str] = "MultipleChoice"
    head: ClassVar[str] = "choose"

    choices: int = 4
    context: str = "context"
    options: str = "choices"
    label: str = "answer"

    def check(self) -> None:
        super().check()
        if self.choices < 2:
            raise ValueError(f"objective.choices is {self.choices}; a question has at least 2")
        if self.labels:
            raise ValueError("objective.labels are for classes; the answer of a question is one of its own choices")

    def build(self) -> classification.MultipleChoice:
        return classification.MultipleChoice(self.choices, self.head)

    def pipeline(self, prepared: Prepared) -> Choices:
        return Choices(self, prepared)


class Choices(Labelled[MultipleChoice]):
    @property
    def together(self) -> int:
        return self.objective.choices

    @cached_property
    def names(self) -> tuple[str, ...]:
        return SCORE

    def names_in(self, row: Row) -> Iterable[str]:
        return SCORE

    def texts(self) -> Iterator[str]:
        for row in self.parts["train"]:
            yield row.text(self.objective.context)
            yield from self.options(row)

    def with_head(self, model: Encoder) -> Model:
        return for_task(model, self.objective.task)

    def of_row(self, row: Row, index: Mapping[str, int]) -> list[Example]:
        context, answer = row.text(self.objective.context), self.answer(row)
        encoded = [self.framer(context, option) for option in self.options(row)]
        return [Example(choice.ids, label=answer, types=choice.type_ids) for choice in encoded]

    def options(self, row: Row) -> list[str]:
        field, wanted = self.objective.options, self.objective.choices
        options = row[field]
        if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
            raise ValueError(f"{row.where}: {field!r} is {options!r}; it must be a list of texts that are not empty")
        if len(options) != wanted:
            raise ValueError(f"{row.where} has {len(options)} choices, but objective.choices is {wanted}")
        return options

    def answer(self, row: Row) -> int:
        """The number of the right choice."""
        answer, options = row.label(self.objective.label), self.options(row)
        number = options.index(answer) if answer in options else answer
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(options):
            raise ValueError(
                f"{row.where}: the answer is {answer!r}; it must be one of the choices, or its number from 0 to "
                f"{len(options) - 1}"
            )
        return number

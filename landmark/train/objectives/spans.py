"""Answers that are spans of a text, by an encoder: SQuAD."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from ...data.batches import IGNORE
from ...data.labelled import Example
from ...data.rows import Row
from ...models.base import Model
from ...models.encoder import Encoder, for_task
from ...objectives import classification
from .labelled import Labelled, LabelledConfig

if TYPE_CHECKING:
    from ..prepare import Prepared


ENDS = ("start", "end")


class SpanExtraction(LabelledConfig):
    """Rows as SQuAD has them: a question, a context, and answers {"text": [...], "answer_start": [...]}, of which the
    first one is learned. Without any the answer is the first token (Devlin et al. 2018, sec. 4.3). Contexts are cut at
    their end; what lies behind is not learned."""

    task: ClassVar[str] = "QuestionAnswering"
    head: ClassVar[str] = "span"

    question: str = "question"
    context: str = "context"
    label: str = "answers"

    def check(self) -> None:
        super().check()
        if self.labels:
            raise ValueError("objective.labels are for classes; a span has a start and an end")

    def build(self) -> classification.SpanExtraction:
        return classification.SpanExtraction(self.head)

    def pipeline(self, prepared: Prepared) -> Spans:
        return Spans(self, prepared)


class Spans(Labelled[SpanExtraction]):
    def texts(self) -> Iterator[str]:
        for row in self.parts["train"]:
            yield row.text(self.objective.question)
            yield row.text(self.objective.context)

    def names_in(self, row: Row) -> Iterable[str]:
        return ENDS

    @cached_property
    def names(self) -> tuple[str, ...]:
        return ENDS

    def with_head(self, model: Encoder) -> Model:
        return for_task(model, self.objective.task)

    def of_row(self, row: Row, index: Mapping[str, int]) -> list[Example]:
        question, context = row.text(self.objective.question), row.text(self.objective.context)
        encoded, span = self.framer(question, context, cut_second=True), self.span(row, context)
        if span is None:
            return [Example(encoded.ids, label=[0, 0], types=encoded.type_ids)]
        start, end = span
        inside = [
            i
            for i, (a, b) in enumerate(encoded.offsets)
            if encoded.sequence_ids[i] == 1 and a < end and start < b  # tokens that overlap the answer
        ]
        last = max((b for i, (_, b) in enumerate(encoded.offsets) if encoded.sequence_ids[i] == 1), default=0)
        label = [inside[0], inside[-1]] if inside and last >= end else [IGNORE, IGNORE]
        return [Example(encoded.ids, label=label, types=encoded.type_ids)]

    def span(self, row: Row, context: str) -> tuple[int, int] | None:
        """Where the first answer begins and ends, in characters."""
        answers = row.label(self.objective.label)
        form = isinstance(answers, dict) and answers.keys() >= {"text", "answer_start"}
        if not form or not all(isinstance(answers[key], list) for key in ("text", "answer_start")):
            raise ValueError(f"{row.where}: answers are {answers!r}; write {{'text': [...], 'answer_start': [...]}}")
        if not answers["text"]:
            return None
        text, start = answers["text"][0], (answers["answer_start"] or [None])[0]
        if not isinstance(text, str) or not isinstance(start, int) or context[start : start + len(text)] != text:
            raise ValueError(f"{row.where}: the answer {text!r} does not stand at {start!r} in its context")
        return start, start + len(text)

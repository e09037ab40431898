"""A tag for each word, by an encoder: named entities, parts of speech."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from ...data.batches import IGNORE
from ...data.labelled import Example
from ...data.rows import Row
from ...objectives import classification
from .labelled import Labelled, LabelledConfig

if TYPE_CHECKING:
    from ..prepare import Prepared


class TokenClassification(LabelledConfig):
    """Rows with a list of words and a list of as many tags. A word's first token has its tag, the others none (Devlin
    et al. 2018, sec. 5.3)."""

    task: ClassVar[str] = "TokenClassification"
    head: ClassVar[str] = "tag"

    words: str = "tokens"
    label: str = "tags"

    def build(self) -> classification.TokenClassification:
        return classification.TokenClassification(self.head)

    def pipeline(self, prepared: Prepared) -> Tags:
        return Tags(self, prepared)


class Tags(Labelled[TokenClassification]):
    def texts(self) -> Iterator[str]:
        for row in self.parts["train"]:
            yield " ".join(self.words(row))

    def words(self, row: Row) -> list[str]:
        words = row[self.objective.words]
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{row.where}: {self.objective.words!r} is {words!r}; it must be a list of words")
        return words

    def names_in(self, row: Row) -> Iterable[str]:
        tags, words = row.label(self.objective.label), self.words(row)
        if not isinstance(tags, list) or len(tags) != len(words):
            raise ValueError(f"{row.where} has {len(words)} words, and needs a list of as many {self.objective.label}")
        return map(str, tags)

    def of_row(self, row: Row, index: Mapping[str, int]) -> list[Example]:
        tags, encoded = list(self.names_in(row)), self.framer(self.words(row))
        targets, before = [], None
        for word in encoded.word_ids:
            targets.append(IGNORE if word is None or word == before else index[tags[word]])
            before = word
        return [Example(encoded.ids, targets=targets, types=encoded.type_ids)]

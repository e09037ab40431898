"""What a model thinks before it answers: `<think>...</think>` at the head of an answer, read as it streams.

However a text is cut into pieces, the two parts add up to the same: line feeds around the marks belong to neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..infer.text import overlap
from ..weights.tokenizer import Tokenizer

BEGIN, END = "<think>", "</think>"


def thinks(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary or the chat template knows the marks."""
    return tokenizer.token_to_id(BEGIN) is not None or BEGIN in (tokenizer.chat_template or "")


def opened(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether the prompt ends within the thought, which some templates begin themselves."""
    return tokenizer.decode(prompt[-16:], skip_special=False).rstrip().endswith(BEGIN)


@dataclass
class ReasoningReader:
    """Feed it text, then `finish`; both return the thought and the answer that have become certain. `opened`: the
    thought has begun before the text."""

    opened: bool = False
    part: Literal["head", "thought", "gap", "answer"] = "head"  # gap: between the end mark and the answer
    _begun: bool = False  # the thought, with more than line feeds
    _held: str = ""

    def feed(self, text: str) -> tuple[str, str]:
        text, self._held = self._held + text, ""
        if self.part == "head":
            bare = text.lstrip()
            if bare != BEGIN and BEGIN.startswith(bare):
                self._held = text
                return "", ""
            found = bare.startswith(BEGIN)
            self.part = "thought" if found or self.opened else "answer"
            text = bare.removeprefix(BEGIN) if found else text
        thought = ""
        if self.part == "thought":
            thought, text = self._think(text)
        if self.part == "gap" and (text := text.lstrip("\n")):
            self.part = "answer"
        return thought, text

    def _think(self, text: str) -> tuple[str, str]:
        """The thought in the text, and what comes after it; what may be its end is held back."""
        thought, mark, after = text.partition(END)
        if not self._begun:
            thought = thought.lstrip("\n")
            self._begun = bool(thought)
        certain = len(thought) if mark else len(thought) - overlap(thought, END)
        kept = thought[:certain].rstrip("\n")
        if mark:
            self.part = "gap"
        else:
            self._held = thought[len(kept) :]
        return kept, after

    def finish(self) -> tuple[str, str]:
        """The rest, when no text follows."""
        rest, self._held = self._held, ""
        inside = self.part == "thought" or (self.part == "head" and self.opened)
        return (rest.rstrip("\n"), "") if inside else ("", rest)

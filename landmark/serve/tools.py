"""Tool calls: how models write them, read as they stream.

A model writes a call between two marks of its own, as a JSON object with the function's name and its arguments. The
reader turns pieces of text into pieces of what the protocol sends: content, the name of a call once, then fragments
of its arguments. However a text is cut into pieces, the fragments add up to the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..infer.text import overlap


@dataclass(frozen=True)
class Dialect:
    """`begin` and `end` stand around a call, or, if `many`, around a list of calls; `arguments` is the key's name."""

    begin: str
    end: str
    arguments: Literal["arguments", "parameters"] = "arguments"
    many: bool = False


HERMES = Dialect("<tool_call>", "</tool_call>")  # Qwen 2.5 and 3, Hermes, and the templates of models trained here
MISTRAL = Dialect("[TOOL_CALLS]", "", many=True)
LLAMA = Dialect("<|python_tag|>", "", "parameters")  # Llama 3.1; also without the mark, as the whole answer


def dialect(template: str | None) -> Dialect:
    """The one that a chat template teaches."""
    source = template or ""
    if "[TOOL_CALLS]" in source:
        return MISTRAL
    if "<tool_call>" not in source and "<|python_tag|>" in source:
        return LLAMA
    return HERMES


@dataclass
class Delta:
    """A piece of an answer: content, or of call number `index` its name (then it begins) or a part of its arguments."""

    content: str = ""
    index: int | None = None
    name: str | None = None
    arguments: str = ""


@dataclass
class Call:
    name: str
    arguments: str


@dataclass
class ToolReader:
    """Feed it text, then `finish`. Text that only looked like a call comes back as content. But what is unfinished at
    the end after a call, or where nothing but calls is allowed (`forced`), is another one that was cut off."""

    dialect: Dialect
    names: Sequence[str]
    forced: bool = False
    calls: list[Call] = field(default_factory=list)
    content: str = ""
    _held: str = ""
    _inside: bool = False
    _object: _Object | None = None
    _began: bool = False  # anything but spaces was said

    def feed(self, text: str) -> list[Delta]:
        """The pieces that are certain after this text."""
        return list(self._read(self._held + text))

    def finish(self) -> list[Delta]:
        """The rest, when no text follows."""
        rest, self._held = self._held, ""
        if self._object is not None:
            rest, self._object = self._object.given_up(), None
        cut = self.forced or self.calls or (self._inside and not rest.strip(" \n\r\t,[]"))
        return [self._say(rest)] if rest and not cut else []

    def _read(self, text: str) -> Iterator[Delta]:
        self._held = ""
        while text or self._object is not None:
            if self._object is not None:
                text = yield from self._in_object(text)
                if self._object is not None:
                    return
            elif self._inside:
                stripped = text.lstrip(" \n\r\t,[" if self.dialect.many else " \n\r\t")
                if stripped.startswith("{"):
                    self._object = _Object(self.dialect.arguments)
                    text = stripped
                elif self.dialect.end and stripped.startswith(self.dialect.end):
                    self._inside, text = False, stripped[len(self.dialect.end) :].lstrip("\n")
                elif not stripped or (self.dialect.end and self.dialect.end.startswith(stripped)):
                    self._held = stripped
                    return
                elif self.dialect.many and stripped.startswith("]"):
                    self._inside, text = False, stripped[1:]
                else:  # no call after all
                    self._inside = False
                    text = stripped
            else:
                before, mark, after = text.partition(self.dialect.begin)
                if mark:
                    if before.strip():
                        yield self._say(before.rstrip())
                    self._inside, text = True, after
                elif self.dialect is LLAMA and not self._began and text.lstrip().startswith("{"):
                    self._object, text = _Object(self.dialect.arguments), text.lstrip()
                else:
                    held = overlap(text, self.dialect.begin)
                    blank = len(text) - held - len(text[: len(text) - held].rstrip())  # goes if a call follows
                    cut = len(text) - held - blank
                    self._held = text[cut:]
                    if text[:cut]:
                        yield self._say(text[:cut])
                    return

    def _in_object(self, text: str) -> Generator[Delta, None, str]:
        """Fragments of a call; returns the text after it."""
        assert self._object is not None
        reading = self._object
        rest = reading.feed(text)
        if reading.name is not None and not reading.announced and reading.name in self.names:
            reading.announced = True
            self.calls.append(Call(reading.name, ""))
            yield Delta(index=len(self.calls) - 1, name=reading.name)
        if reading.announced and (fragment := reading.take()):
            self.calls[-1].arguments += fragment
            yield Delta(index=len(self.calls) - 1, arguments=fragment)
        if not reading.complete:
            return ""
        self._object = None
        if not reading.announced:
            yield self._say(reading.text)
        elif not self.calls[-1].arguments:
            self.calls[-1].arguments = "{}"
            yield Delta(index=len(self.calls) - 1, arguments="{}")
        return rest

    def _say(self, text: str) -> Delta:
        self._began = self._began or bool(text.strip())
        self.content += text
        return Delta(content=text)


class _Object:
    """A JSON object that arrives in pieces: the value of "name", and the text of the value of the arguments' key."""

    _NAME = re.compile(r'^[{,]\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")')

    def __init__(self, key: str) -> None:
        self._key = key
        self.text, self.name, self.announced, self.complete = "", None, False, False
        self._depth, self._string, self._escape = 0, False, False
        self._field = 0  # where the present field of the object begins
        self._from: int | None = None  # where the arguments' value begins
        self._until: int | None = None
        self._taken = 0

    name: str | None

    def feed(self, text: str) -> str:
        """Read on; returns what comes after the object's end."""
        for place, character in enumerate(text):
            at = len(self.text)
            self.text += character
            if self._string:
                if self._escape:
                    self._escape = False
                elif character == "\\":
                    self._escape = True
                elif character == '"':
                    self._string = False
                    self._look()
                continue
            value = self._from is None and self._depth == 1 and not character.isspace()
            if value and self._is_arguments(at):
                self._from = at
            if character == '"':
                self._string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
            if self._depth <= 1 and self._from is not None and self._until is None and at > self._from:
                if self._depth == 1 and character in "}]":
                    self._until = at + 1
                elif character == "," or self._depth == 0:
                    self._until = at
            if self._depth == 1 and character in "{,":
                self._field = at
            if self._depth == 0:
                self.complete = True
                return text[place + 1 :]
        return ""

    def take(self) -> str:
        """The part of the arguments' text that was not taken yet."""
        if self._from is None:
            return ""
        start = self._from + self._taken
        end = len(self.text) if self._until is None else self._until
        if self._until is None and self.text[self._from] not in '{["':
            return ""  # a number's end is not to be seen
        self._taken = end - self._from
        return self.text[start:end]

    def given_up(self) -> str:
        """The text of an object that never ended, if no call began in it."""
        return "" if self.announced else self.text

    def _look(self) -> None:
        """A string has ended: was it the name?"""
        if self._depth == 1 and (found := self._NAME.match(self.text[self._field :])):
            try:
                self.name = str(json.loads(found[1]))
            except ValueError:
                self.name = None

    def _is_arguments(self, at: int) -> bool:
        return re.fullmatch(rf'[{{,]\s*"{self._key}"\s*:\s*', self.text[self._field : at]) is not None


def grammar(dialect: Dialect, functions: Sequence[dict[str, Any]], parallel: bool, begin_id: int | None = None) -> str:
    """A grammar of answers that are one call, or several: for `tool_choice` "required" or a named function. `begin_id`
    is the special token that begins a call, where it is one."""
    newline = "\n" if dialect is HERMES else ""
    begin = json.dumps(dialect.begin + newline) if begin_id is None else f"<[{begin_id}]>"
    end = json.dumps(newline + dialect.end) if dialect.end else ""
    more = '(", " call)*' if parallel else ""
    again = f'("\\n" {begin} call {end})*' if parallel and dialect.end else ""
    body = f'{begin} "[" call {more} "]"' if dialect.many else f"{begin} call {end} {again}"
    lines = ["%llguidance {}", f"start: {body}", "call: " + " | ".join(f"call{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        head = json.dumps(f'{{"name": {json.dumps(function["name"])}, "{dialect.arguments}": ')
        compact = {"x-guidance": {"whitespace_flexible": False}}
        schema = json.dumps({**(function.get("parameters") or {"type": "object"}), **compact})
        lines += [f'call{i}: {head} arguments{i} "}}"', f"arguments{i}: %json {schema}"]
    return "\n".join(lines)

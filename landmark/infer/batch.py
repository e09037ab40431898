"""A file of prompts to a file of answers: JSON lines in, JSON lines out in the same order.

A line of the input holds "prompt" (text or ids) or "messages" (a conversation, with "tools" if there are any), and may
hold an "id", "n", and any field of `Sampling`. Its line of the output holds the "id" (the line's number, from 1, if it
has none), "prompt_tokens" and "answers" with "text", "tokens" and "finish" each, or an "error".

What is answered is kept beside the output, under its name and `.partial`, until all is; a run that was killed goes on
from there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO

from ..config import nearest
from ..weights.files import beside
from .chat import prompt_ids, turn_ends
from .engine import Engine, EngineError, Handle, Request
from .sampling import Sampling

SETTINGS = tuple(field.name for field in fields(Sampling))
NUMBER = (int | float, "a number")
KINDS: dict[str, tuple[Any, str]] = {
    "stop": (list, "a text or a list of texts"),
    "stop_ids": (list | None, "a list of token ids"),
    "logit_bias": (dict, "an object of token ids and numbers"),
    "seed": (int | None, "a whole number"),
}
KEYS = ("prompt", "messages", "tools", "id", "n", *SETTINGS)


@dataclass
class Progress:
    """Lines of the input, how many of them are answered (some in an earlier run) and failed, and tokens written now."""

    total: int
    done: int = 0
    failed: int = 0
    tokens: int = 0


def answer_file(
    engine: Engine, source: Path, target: Path, defaults: Sampling, *, key: str = "",
    report: Callable[[Progress], None] = lambda _: None,
) -> Progress:  # fmt: skip
    """Answer every line of `source` into `target`, with `defaults` where a line does not say otherwise.

    `key` names what else the answers depend on (the model): a run that was cut short goes on only where it, the
    defaults and the input are the same. Raises ValueError for lines that cannot be read, before anything is answered,
    and for a `target` that is there already.
    """
    if target.exists():
        raise ValueError(f"{target} exists; remove it, or give another name for the answers")
    lines = read_lines(source)
    digest = hashlib.sha256(source.read_bytes() + repr((key, defaults)).encode()).hexdigest()
    partial = target.with_name(target.name + ".partial")
    answered = _resume(partial, digest, source)
    progress = Progress(len(lines), len(answered), sum("error" in record for record in answered.values()))
    report(progress)
    with open(partial, "a", encoding="utf-8") as file:
        for number, record in _answers(engine, lines, defaults, answered):
            answered[number] = record
            _append(file, {"line": number, "record": record})
            progress.done += 1
            progress.failed += "error" in record
            progress.tokens += sum(len(answer["tokens"]) for answer in record.get("answers", ()))
            report(progress)
    with beside(target) as temporary, open(temporary, "w", encoding="utf-8") as out:
        for number in range(len(lines)):
            _append(out, answered[number])
    partial.unlink()
    return progress


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a batch. Raises ValueError, naming the line, for one that cannot be asked."""
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    found = []
    for number, text in enumerate(texts, 1):
        where = f"{path}, line {number}"
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(line, dict):
            raise ValueError(f"{where} holds a {type(line).__name__}; each line must be a JSON object")
        if unknown := [key for key in line if key not in KEYS]:
            raise ValueError(f"{where}: {unknown[0]!r} is not known{nearest(unknown[0], KEYS)}")
        if ("prompt" in line) == ("messages" in line):
            raise ValueError(f'{where} needs "prompt" or "messages", and not both')
        if not isinstance(line.get("prompt", ""), str | list):
            raise ValueError(f"{where}: prompt is {line['prompt']!r}; it must be a text or a list of token ids")
        if not isinstance(line.get("messages", []), list):
            raise ValueError(f"{where}: messages is {line['messages']!r}; it must be a list")
        if not isinstance(n := line.get("n", 1), int) or isinstance(n, bool):
            raise ValueError(f"{where}: n is {n!r}; it must be a whole number")
        try:
            sampling(line, Sampling())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        found.append(line)
    if not found:
        raise ValueError(f"{path} is empty; give it a line of JSON for each prompt")
    return found


def sampling(line: Mapping[str, Any], defaults: Sampling) -> Sampling:
    """The settings of a line, as JSON says them."""
    changes = {name: line[name] for name in SETTINGS if name in line}
    if isinstance(changes.get("stop"), str):
        changes["stop"] = [changes["stop"]]
    for name, value in changes.items():
        kind, wanted = KINDS.get(name, NUMBER)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be {wanted}")
    for name in ("stop", "stop_ids"):
        if changes.get(name) is not None:
            changes[name] = tuple(changes[name])
    if bad := [token for token in changes.get("logit_bias", ()) if not token.isdecimal()]:
        raise ValueError(f"logit_bias names {bad[0]!r}; its keys must be token ids")
    if "logit_bias" in changes:
        changes["logit_bias"] = {int(token): bias for token, bias in changes["logit_bias"].items()}
    return replace(defaults, **changes)


def _answers(
    engine: Engine, lines: list[dict[str, Any]], defaults: Sampling, answered: Mapping[int, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """What is still to be answered, as it is; enough of it waits at any time for the engine to be full."""
    waiting = iter([number for number in range(len(lines)) if number not in answered])
    asked: dict[int, Handle] = {}
    ends = Ends(engine)
    more = True
    while more or asked:
        while more and len(asked) < 2 * engine.max_batch:
            number = next(waiting, None)
            if number is None:
                more = False
                break
            try:
                asked[number] = engine.submit(_request(engine, lines[number], defaults, ends))
            except ValueError as error:
                yield number, {"id": lines[number].get("id", number + 1), "error": str(error)}
        engine.step()
        for number in [number for number, handle in asked.items() if handle.done]:
            yield number, _record(lines[number].get("id", number + 1), asked.pop(number))


class Ends:
    """What ends an answer in a conversation, looked up once."""

    def __init__(self, engine: Engine) -> None:
        assert engine.tokenizer is not None, "a batch of texts needs an engine with a tokenizer"
        self.tokenizer = engine.tokenizer
        self.turn = turn_ends(engine.model, self.tokenizer) if self.tokenizer.chat_template is not None else ()


def _request(engine: Engine, line: Mapping[str, Any], defaults: Sampling, ends: Ends) -> Request:
    settings, tokenizer = sampling(line, defaults), ends.tokenizer
    if "messages" in line:
        ids = tokenizer.encode_chat(line["messages"], line.get("tools"))
        if settings.stop_ids is None:
            settings = replace(settings, stop_ids=ends.turn)
    elif isinstance(line["prompt"], str):
        ids = prompt_ids(tokenizer, line["prompt"])
    else:
        ids = line["prompt"]
    return Request(prompt=ids, sampling=settings, n=line.get("n", 1))


def _record(name: Any, handle: Handle) -> dict[str, Any]:
    try:
        answers = handle.result()
    except EngineError as error:
        return {"id": name, "error": str(error)}
    said = [{"text": answer.text, "tokens": answer.tokens, "finish": answer.finish} for answer in answers]
    return {"id": name, "prompt_tokens": len(handle.request.prompt), "answers": said}


def _resume(partial: Path, digest: str, source: Path) -> dict[int, dict[str, Any]]:
    """What an earlier run has answered; a last line that it could not finish is cut off."""
    if not partial.exists():
        with beside(partial) as temporary, open(temporary, "w", encoding="utf-8") as file:
            _append(file, {"batch": digest})
        return {}
    data = partial.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    header, *rows = [json.loads(row) for row in whole.splitlines()]
    if header != {"batch": digest}:
        raise ValueError(
            f"{partial} was begun with another input, model or settings than {source} now; remove it to begin again"
        )
    os.truncate(partial, len(whole))
    return {row["line"]: row["record"] for row in rows}


def _append(file: TextIO, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()

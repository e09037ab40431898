"""A file of prompts to a file of answers: JSON lines in, JSON lines out in the same order.

A line of the input holds "prompt" (text or ids) or "messages" (a conversation, with "tools" if there are any), and may
hold an "id", "n", and any field of `Sampling`. Its line of the output holds the "id" (the line's number, from 1, if it
has none), "prompt_tokens" and "answers" with "text", "tokens" and "finish" each, or an "error".

What is answered is kept beside the output, under its name and `.partial`, until all is; a run that was killed goes on
from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

from ..config import nearest
from ..weights.files import beside, naming, read_json_lines
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
    check_target(target)
    lines = read_lines(source)
    digest = hashlib.sha256(source.read_bytes() + repr((key, defaults)).encode()).hexdigest()
    partial = target.with_name(target.name + ".partial")
    with naming(partial), open(partial, "a+b") as file:
        answered = _resume(file, partial, digest, source)
        progress = Progress(len(lines), len(answered), sum("error" in record for record in answered.values()))
        report(progress)
        for number, record in _answers(engine, lines, defaults, answered):
            answered[number] = record
            _append(file, {"line": number, "record": record})
            progress.done += 1
            progress.failed += "error" in record
            progress.tokens += sum(len(answer["tokens"]) for answer in record.get("answers", ()))
            report(progress)
        with beside(target) as temporary, open(temporary, "wb") as out:
            for number in lines:
                _append(out, answered[number])
        partial.unlink()
    return progress


def check_target(target: Path) -> None:
    """Raises ValueError for answers that are there already, and OSError where none can be written."""
    if target.exists():
        raise ValueError(f"{target} exists; remove it, or give another name for the answers")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None


def read_lines(path: Path) -> dict[int, dict[str, Any]]:
    """The lines of a batch by their number. Raises ValueError, naming the line, for one that cannot be asked."""
    found = {}
    for number, line in read_json_lines(path):
        try:
            check_line(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        found[number] = line
    if not found:
        raise ValueError(f"{path} is empty; give it a line of JSON for each prompt")
    return found


def check_line(line: Any) -> None:
    """Raises ValueError for what cannot be asked."""
    if not isinstance(line, dict):
        raise ValueError(f"it holds a {type(line).__name__}; each line must be a JSON object")
    if unknown := [key for key in line if key not in KEYS]:
        raise ValueError(f"{unknown[0]!r} is not known{nearest(unknown[0], KEYS)}")
    if ("prompt" in line) == ("messages" in line):
        raise ValueError('it needs "prompt" or "messages", and not both')
    prompt = line.get("prompt", "")
    if not isinstance(prompt, str) and (bad := wrong_items(prompt, int)):
        raise ValueError(f"prompt {bad}; it must be a text or a list of token ids")
    for name in ("messages", "tools"):
        if bad := wrong_items(line.get(name, []), dict):
            raise ValueError(f"{name} {bad}; it must be a list of objects")
    for message in line.get("messages", ()):
        for name in ("role", *(() if message.get("tool_calls") else ("content",))):
            if not isinstance(message.get(name), str):
                raise ValueError(f"a message has the {name} {message.get(name)!r}; it must be a text")
    if "messages" in line and not line["messages"]:
        raise ValueError("messages is empty; give at least one")
    if not isinstance(n := line.get("n", 1), int) or isinstance(n, bool):
        raise ValueError(f"n is {n!r}; it must be a whole number")
    sampling(line, Sampling())


def wrong_items(value: Any, kind: type) -> str:
    """What is wrong with a list that holds nothing but `kind`; "" for nothing."""
    if not isinstance(value, list):
        return f"is {value!r}"
    wrong = [item for item in value if not isinstance(item, kind) or isinstance(item, bool)]
    return f"holds {wrong[0]!r}" if wrong else ""


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
    engine: Engine, lines: Mapping[int, Mapping[str, Any]], defaults: Sampling, answered: Mapping[int, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """What is still to be answered, as it is; enough of it waits at any time for the engine to be full."""
    waiting = iter([number for number in lines if number not in answered])
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
                yield number, {"id": lines[number].get("id", number), "error": str(error)}
        engine.step()
        for number in [number for number, handle in asked.items() if handle.done]:
            yield number, _record(lines[number].get("id", number), asked.pop(number))


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


def _resume(file: IO[bytes], partial: Path, digest: str, source: Path) -> dict[int, dict[str, Any]]:
    """What an earlier run has answered; a last line that it could not finish is cut off."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{partial} is being written by another run; wait for it, or give another --output") from None
    file.seek(0)
    data = file.read()
    if not data:
        _append(file, {"input": digest})
        return {}
    whole = data[: data.rfind(b"\n") + 1]
    header, *rows = whole.split(b"\n")[:-1] or [b""]
    if header != json.dumps({"input": digest}).encode():
        raise ValueError(
            f"{partial} was begun with another input, model or settings than {source} now; remove it to begin again"
        )
    file.truncate(len(whole))
    return {row["line"]: row["record"] for row in map(json.loads, rows)}


def _append(file: IO[bytes], record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    file.flush()

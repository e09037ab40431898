"""A file of prompts: every line is answered as it would be alone, in order, whatever interrupts it."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import landmark
from landmark.cli.main import app
from landmark.infer import batch
from landmark.infer.batch import Progress, answer_file
from landmark.infer.chat import prompt_ids, turn_ends
from landmark.infer.engine import Engine
from landmark.infer.generate import generate
from landmark.infer.sampling import Sampling

from .models import build, speaker, tokenizer

DEFAULTS = Sampling(temperature=0.7, seed=1, max_tokens=8)
LINES: list[dict[str, Any]] = [
    {"prompt": "The value of", "id": "first"},
    {"prompt": "An import", "temperature": 0, "max_tokens": 3},
    {"prompt": [5, 6, 7], "seed": 9, "stop": "e", "n": 2},
    {"prompt": "a " * 200, "id": 7},  # longer than the context
    {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5},
    *({"prompt": f"Number {n} is", "max_tokens": 1 + n} for n in range(12)),
]


@pytest.fixture(autouse=True)
def template(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    monkeypatch.setitem(tokenizer().chat_templates, "default", source)


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def engine() -> Engine:
    return Engine(speaker(), tokenizer(), memory=1 << 24, max_batch=3, block=8)


def expected(line: dict[str, Any], seed: int) -> dict[str, Any]:
    """One answer of a line, alone."""
    words = tokenizer()
    ids = words.encode_chat(line["messages"]) if "messages" in line else line["prompt"]
    ids = prompt_ids(words, ids) if isinstance(ids, str) else ids
    changes = {name: line[name] for name in ("temperature", "max_tokens") if name in line}
    stop = (line["stop"],) if "stop" in line else ()
    stop_ids = turn_ends(speaker(), words) if "messages" in line else None
    settings = Sampling(**{"temperature": 0.7, "max_tokens": 8, **changes}, seed=seed, stop=stop, stop_ids=stop_ids)
    answer = generate(speaker(), [ids], settings, tokenizer=words)[0]
    return {"text": answer.text, "tokens": answer.tokens, "finish": answer.finish}


def check(records: list[dict[str, Any]]) -> None:
    assert len(records) == len(LINES)
    for number, (line, record) in enumerate(zip(LINES, records, strict=True), 1):
        assert record["id"] == line.get("id", number)
        if line.get("id") == 7:
            assert "longer than the model's context" in record["error"]
            continue
        seed = line.get("seed", 1)
        assert record["answers"] == [expected(line, seed + n) for n in range(line.get("n", 1))]


def test_every_line_as_alone(tmp_path: Path) -> None:
    source, target, seen = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl", []
    done = answer_file(engine(), source, target, DEFAULTS, report=lambda p: seen.append(p.done))
    check(read(target))
    assert (done.total, done.done, done.failed) == (len(LINES), len(LINES), 1) and seen == list(range(len(LINES) + 1))
    assert [path.name for path in tmp_path.iterdir()].count("out.jsonl.partial") == 0
    with pytest.raises(ValueError, match=r"out\.jsonl exists"):
        answer_file(engine(), source, target, DEFAULTS)


def test_it_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"

    def stop_at(count: int) -> Any:
        def report(progress: Progress) -> None:
            if progress.done == count:
                raise KeyboardInterrupt

        return report

    for count in (3, 9):
        with pytest.raises(KeyboardInterrupt):
            answer_file(engine(), source, target, DEFAULTS, report=stop_at(count))
        assert not target.exists()
        with open(partial, "a") as file:
            file.write('{"line": 5, "rec')  # what a kill may leave
    seen: list[int] = []
    done = answer_file(engine(), source, target, DEFAULTS, report=lambda p: seen.append(p.done))
    assert seen[0] == 9 and done.failed == 1 and not partial.exists()
    check(read(target))


def test_another_run_is_not_taken_up(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_file(engine(), source, target, DEFAULTS, report=interrupt)
    with pytest.raises(ValueError, match="another input, model or settings"):
        answer_file(engine(), source, target, Sampling(temperature=0))
    partial = tmp_path / "out.jsonl.partial"
    with open(partial, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="being written by another run"):
            answer_file(engine(), source, target, DEFAULTS)
    partial.write_text("somebody else's")
    with pytest.raises(ValueError, match="another input"):
        answer_file(engine(), source, target, DEFAULTS)
    assert partial.read_text() == "somebody else's"


def test_lines_end_with_line_feeds_alone(tmp_path: Path) -> None:
    """What other systems write before, between and in lines; a line keeps its number as its name."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes('\ufeff{"prompt": "a\u2028b\x85c"}\r\n\r\n{"prompt": "x"}\n\n'.encode())
    answer_file(engine(), source, target, DEFAULTS)
    assert [(record["id"], len(record["answers"])) for record in read(target)] == [(1, 1), (3, 1)]


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    append, written = batch._append, []

    def full(file: Any, record: Any) -> None:
        written.append(record)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(file, record)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_append", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*out\.jsonl\.partial'"):
            answer_file(engine(), source, target, DEFAULTS)
    assert not target.exists()
    answer_file(engine(), source, target, DEFAULTS)
    check(read(target))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2 is not JSON"),
        ("[1]", "line 2: it holds a list"),
        ("{}", 'needs "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', "and not both"),
        ('{"prompt": "a", "temprature": 1}', "'temprature' is not known.*temperature"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature is 'hot'"),
        ('{"prompt": "a", "top_p": 2}', "top_p is 2"),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens is 1.5"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias names 'x'"),
        ('{"prompt": "a", "stop": 3}', "stop is 3"),
        ('{"prompt": "a", "top_k": ' + "9" * 19 + "}", "top_k is 9999999999999999999"),
        ('{"prompt": "a", "presence_penalty": ' + "9" * 400 + "}", "presence_penalty is 999"),
        ('{"prompt": "a", "logit_bias": {"5": ' + "9" * 400 + "}}", "logit_bias is {5: 999"),
        ('{"prompt": "a", "stop": [3]}', r"stop is \(3,\)"),
        ('{"prompt": "a", "logit_bias": {"5": "x"}}', "logit_bias is {5: 'x'}"),
        ('{"prompt": 3}', "prompt is 3"),
        ('{"prompt": [5, "a"]}', "prompt holds 'a'"),
        ('{"prompt": "a", "id": "\\ud800"}', r"line 2 holds half a character, U\+D800"),
        ('{"prompt": "a", "id": ' + "[" * 9999 + "]" * 9999 + "}", "line 2 is not JSON"),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": [1]}', "messages holds 1"),
        ('{"messages": [{"role": "user"}]}', "a message has the content None"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": 5}', "tools is 5"),
        ('{"prompt": "a", "n": "two"}', "n is 'two'"),
    ],
)
def test_bad_lines_are_named_before_anything_is_answered(tmp_path: Path, line: str, message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        answer_file(engine(), source, tmp_path / "out.jsonl", DEFAULTS)
    assert list(tmp_path.iterdir()) == [source]


def test_the_command(tmp_path: Path) -> None:
    landmark.save(speaker(), tmp_path / "model")
    tokenizer().save(tmp_path / "model")
    source, target = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    arguments = ["--temperature", "0.7", "--seed", "1", "--max-tokens", "8", "--at-once", "4", "--json"]
    command = ["generate", str(tmp_path / "model"), "--batch", str(source), *arguments]
    assert "needs --output" in str(CliRunner().invoke(app, command).exception)
    done = CliRunner().invoke(app, [*command, "--output", str(target)])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["lines"], report["failed"]) == (len(LINES), 1)
    check(read(target))
    source.write_text('{"prompt": "' + "a " * 200 + '"}\n')
    assert CliRunner().invoke(app, [*command, "--output", str(tmp_path / "none.jsonl")]).exit_code == 1  # all failed
    write(source, LINES)
    drafted = CliRunner().invoke(app, [*command, "--draft", "lookup", "--output", str(tmp_path / "drafted.jsonl")])
    assert drafted.exit_code == 0, drafted.output
    check(read(tmp_path / "drafted.jsonl"))
    rounded = CliRunner().invoke(app, [*command, "--quantise", "int4", "--output", str(tmp_path / "rounded.jsonl")])
    assert rounded.exit_code == 0 and read(tmp_path / "rounded.jsonl") != read(target)
    nowhere = CliRunner().invoke(app, [*command, "--output", "/proc/out.jsonl"]).exception
    assert isinstance(nowhere, OSError) and nowhere.filename == "/proc/out.jsonl"
    again = str(CliRunner().invoke(app, [*command, "--output", str(target)]).exception)
    assert "out.jsonl exists" in again
    astray = ["generate", str(tmp_path / "model"), "x", "--output", str(tmp_path / "x")]
    assert "--output is for the answers to --batch" in str(CliRunner().invoke(app, astray).exception)


def test_another_model_under_the_same_name_is_not_taken_up(tmp_path: Path) -> None:
    for name, model in (("model", speaker()), ("other", build(speaker().origin.hf, seed=1))):
        landmark.save(model, tmp_path / name)
        tokenizer().save(tmp_path / name)
    source, target = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    command = ["generate", str(tmp_path / "model"), "--batch", str(source), "--output", str(target)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        stopped = CliRunner().invoke(app, command)
        assert stopped.exit_code == 130 and "the same command goes on" in stopped.stderr
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path / "model/model.safetensors")
    other = CliRunner().invoke(app, command)
    assert "another input, model" in str(other.exception) and other.stderr == ""  # no bar before the message

"""A file of prompts: every line is answered as it would be alone, in order, whatever interrupts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import landmark
from landmark.cli.main import app
from landmark.infer.batch import Progress, answer_file
from landmark.infer.chat import prompt_ids, turn_ends
from landmark.infer.engine import Engine
from landmark.infer.generate import generate
from landmark.infer.sampling import Sampling

from .models import speaker, tokenizer

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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2 is not JSON"),
        ("[1]", "line 2 holds a list"),
        ("{}", 'needs "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', "and not both"),
        ('{"prompt": "a", "temprature": 1}', "'temprature' is not known.*temperature"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature is 'hot'"),
        ('{"prompt": "a", "top_p": 2}', "top_p is 2"),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens is 1.5"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias names 'x'"),
        ('{"prompt": "a", "stop": 3}', "stop is 3"),
        ('{"prompt": 3}', "prompt is 3"),
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

"""The command line as a whole: every command's help, its options, and one clear line for input that cannot work."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import landmark
from landmark.cli.main import COMMANDS, EXAMPLES, app, main
from landmark.cli.reproduce import list_experiments
from landmark.weights.tokenizer_train import train_tokenizer

SILENT = {"chat", "serve"}  # commands that report nothing
BODY = {
    "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


def leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    below = getattr(command, "commands", {})
    if not below:
        yield path, command
    for name, child in below.items():
        yield from leaves(child, f"{path} {name}")


def commands() -> dict[str, Any]:
    root: Any = typer.main.get_command(app)
    return dict(pair for name in COMMANDS for pair in leaves(root.get_command(None, name), name))


def test_every_command_shows_an_example_and_reports_as_json() -> None:
    known = commands()
    assert set(EXAMPLES) <= known.keys() | {"papers"}
    for path, command in known.items():
        shown = CliRunner().invoke(app, [*path.split(), "--help"], terminal_width=150)
        assert shown.exit_code == 0 and "-completion" not in shown.stdout
        assert re.search(rf"landmark {path}\s", shown.stdout), path
        assert "[[" not in shown.stdout and "...]" not in shown.stdout, path
        options = {name for parameter in command.params for name in parameter.opts}
        assert "--json" in options or path in SILENT, path


def test_examples_have_options_that_there_are() -> None:
    known = commands()
    for path, example in EXAMPLES.items():
        command = known.get(path) or known["papers search"]
        given = {word for word in shlex.split(example) if word.startswith("--")}
        assert example.startswith(f"landmark {path}")
        assert given <= {name for parameter in command.params for name in parameter.opts}, path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("cli")
    tokenizer = train_tokenizer("bpe", ["the cat sat on the mat " * 9], 300)
    for name, architecture in (("model", "LlamaForCausalLM"), ("bert", "BertModel")):
        torch.manual_seed(0)
        hf = {"architectures": [architecture], **BODY, "vocab_size": tokenizer.vocab_size}
        landmark.save(landmark.build(hf), where / name)
        tokenizer.save(where / name)
    for name, architecture in (("larger", "LlamaForCausalLM"), ("largerbert", "BertModel")):  # a tokenizer of another
        landmark.save(landmark.build({"architectures": [architecture], **BODY, "vocab_size": 262}), where / name)
        tokenizer.save(where / name)
    (where / "ok.txt").write_text("the cat sat on the mat.\n" * 200)
    (where / "empty.txt").write_text("")
    (where / "bytes.txt").write_bytes(bytes(range(256)))
    (where / "run.toml").write_text('out = "run"\nsteps = 500\n')
    (where / "cut.toml").write_text('out = "run\n')
    (where / "asked.jsonl").write_text('{"context": "a"}\n')
    return where


WRONG = [
    ("quickstart --text nowhere.txt --out q", "nowhere.txt: no such file or folder"),
    ("quickstart --out ok.txt --steps 4", "ok.txt is a file; a run needs a directory"),
    ("train nowhere.toml", "nowhere.toml: no such file"),
    ("train cut.toml", "cut.toml is not valid TOML"),
    ("train run.toml --set steps", "write it as key=value"),
    ("train run.toml --set optimzer.lr=1", "no key 'optimzer'; did you mean 'optimizer'"),
    ("train run.toml --set model=gpt22", "no published size is called 'gpt22'; did you mean 'gpt2'"),
    ("train run.toml --set device=tpu", "there is no device 'tpu' here"),
    ("train run.toml --set compile=true --set recompute=true", "recompute and compile do not go together"),
    ("generate nowhere hello", "nowhere is no directory, and no hub id"),
    ("generate model hello --temperature -1", "temperature is -1.0; it must be 0"),
    ("generate model hello --device cudaa", "there is no device 'cudaa' here"),
    ("generate model --file nowhere.txt", "nowhere.txt: No such file or directory"),
    ("generate bert hello", "bert is an Encoder, which does not generate"),
    ("chat bert", "bert is an Encoder, which does not generate"),
    ("serve nowhere", "nowhere is no directory"),
    ("serve model --device cudaa --port 0", "there is no device 'cudaa' here"),
    ("bench serve http://127.0.0.1:1", "no server answers at http://127.0.0.1:1"),
    ("bench soak --url http://127.0.0.1:1", "no server answers at http://127.0.0.1:1"),
    ("inspect .", "config.json does not exist; a model directory needs it"),
    ("inspect gpt22", "did you mean 'gpt2'"),
    ("inspect model --context 0", "a context of 0 tokens is none"),
    ("transform model out", "there is nothing to transform"),
    ("transform model model --kv-heads 2", "model exists already"),
    ("transform model out --kv-heads 3", "choose a divisor"),
    ("convert ok.txt out", "ok.txt is no .pth file"),
    ("eval model", "nothing to evaluate"),
    ("eval model --text bytes.txt", "bytes.txt is no text in UTF-8 (byte 128 is 0x80)"),
    ("eval model --text .", ".: Is a directory"),
    ("eval model --choices asked.jsonl", "asked.jsonl, line 1: 'choices'"),
    ("eval model --text ok.txt --stride 0", "--stride"),
    ("eval bert --text ok.txt", "bert is an Encoder; evaluation by likelihood needs a decoder"),
    ("embed model --text a", "model is a Decoder; sentence embeddings need an encoder"),
    ("embed bert --text a --pool middle", "pooling 'middle' is not supported"),
    ("eval model --text ok.txt --tasks arc --include nowhere", "nowhere is no folder"),
    ("eval larger --text ok.txt", "but the model's vocabulary ends at 261"),
    ("embed largerbert --text cat", "but the model's vocabulary ends at 261"),
    ("data train-tokenizer empty.txt --out t", "empty.txt holds no text"),
    ("data train-tokenizer ok.txt --out model", "model exists already"),
    ("data train-tokenizer ok.txt --out t --kind unigram --vocab-size 262 --part all", "vocab_size 262 is too small"),
    ("data train-tokenizer ok.txt --out t --separator ''", "--separator is empty"),
    ("data train-tokenizer ok.txt --out t --separator 'a\\'", r"--separator 'a\\': \ at end of string"),
    ("data tokenize ok.txt --tokenizer nowhere --out s", "nowhere: no such tokenizer"),
    ("data tokenize ok.txt --tokenizer model --out s --shard-tokens 0", "--shard-tokens"),
    ("data tokenize ok.txt --tokenizer model --out s --part train --held-out 2", "--held-out"),
    ("data info model", "model holds no shards"),
    ("papers show nosuch", "no paper 'nosuch'"),
    ("papers search --theme nosuch", "no theme 'nosuch'"),
    ("reproduce Z99", "there is no experiment 'Z99'"),
    ("reproduce F1 --quick --out ok.txt", "Not a directory"),
    ("nosuch", "No such command 'nosuch'"),
    ("generat", "No such command 'generat'. Did you mean 'generate'"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_wrong_input_is_one_line(
    line: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["landmark", *shlex.split(line)])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == 2
    if "Usage:" not in told:  # typer's own errors stand in a box
        assert told.startswith("landmark: ") and told.count("\n") == 1
    assert message in re.sub(r"\s*│\s*", " ", told)


def test_the_package_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "landmark", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "landmark" in done.stdout and "serve" in done.stdout


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["landmark", *shlex.split(line)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (None, 0)


def test_closed_streams_and_texts_of_no_encoding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for given, message in ((None, "the prompt is empty"), (b"a \xff", "standard input is no text in UTF-8 (byte 2")):
        told = io.TextIOWrapper(io.BytesIO(), "ascii")  # a locale that knows no more
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["landmark", "generate", "model"])
            patch.setattr("sys.stdin", given and io.TextIOWrapper(io.BytesIO(given), "utf-8"))
            patch.setattr("sys.stdout", None)
            patch.setattr("sys.stderr", told)
            with pytest.raises(SystemExit) as ended:
                main()
        told.seek(0)
        assert ended.value.code == 2 and message in told.read()
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", out)
    run(folder, monkeypatch, "papers show rope --json")
    out.seek(0)
    assert "θ" in json.loads(out.read())["contribution"]["en"]


def test_too_little_memory_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.chdir(folder)
    monkeypatch.setattr("landmark.weights.checkpoint.read_tensors", full)
    monkeypatch.setattr("sys.argv", ["landmark", "generate", "model", "hello"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == 1 and told.count("\n") == 1 and "Tried to allocate 2 GiB" in told


def test_home_after_an_equals_sign(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    run(folder, monkeypatch, "embed bert --file=~/ok.txt --json")
    assert len(json.loads(capsys.readouterr().out)) == 200
    run(folder, monkeypatch, "embed bert --text=~/ok.txt --json")  # a text, not a path
    assert json.loads(capsys.readouterr().out)[0]["text"] == "~/ok.txt"


def test_embed_shows_any_texts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Markup is text; more texts than columns are listed with their neighbours."""
    run(folder, monkeypatch, "embed bert --text '[red]cat[/red] [/]' --text mat")
    assert "[red]cat[/red] [/]" in capsys.readouterr().out
    (folder / "lines.txt").write_text("".join(f"the cat number {n}\n" for n in range(30)))
    run(folder, monkeypatch, "embed bert --file lines.txt")
    shown = capsys.readouterr().out
    assert "the nearest" in shown and "…" not in shown and len(shown.splitlines()) == 35


def test_a_broken_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "A1").mkdir()
    (tmp_path / "A1" / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"A1/report.json is not valid JSON"):
        list_experiments(None, tmp_path, True)

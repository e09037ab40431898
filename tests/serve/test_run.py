"""How `landmark serve` ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

import landmark

from .conftest import SIZE, model_and_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that talks for minutes."""
    where = tmp_path_factory.mktemp("run") / "long"
    _, tokenizer = model_and_tokenizer()
    torch.manual_seed(0)
    size = {**SIZE, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 100_000, "num_hidden_layers": 8}
    landmark.save(landmark.build(size), where)
    tokenizer.save(where)
    return where


class Process:
    """The server in a process of its own, which one client listens to."""

    def __init__(self, directory: Path, *options: str) -> None:
        command = [sys.executable, "-m", "landmark", "serve", str(directory), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.told = ""
        while (found := re.search(r"at (http://\S+) ", self.told)) is None:
            line = self.process.stderr.readline()
            assert line, self.told
            self.told += line
        self.url, self.heard = found[1], b""
        self.listening = threading.Thread(target=self._listen)
        self.listening.start()
        while self.heard.count(b"data: ") < 3:
            time.sleep(0.01)
            assert self.listening.is_alive(), self.heard

    def _listen(self) -> None:
        body = {"model": "long", "prompt": [5, 6, 7], "max_tokens": 90_000, "ignore_eos": True, "stream": True}
        try:
            with httpx.stream("POST", self.url + "/v1/completions", json=body, timeout=60) as answer:
                for piece in answer.iter_bytes():
                    self.heard += piece
        except httpx.RemoteProtocolError:
            self.heard += b"(broken off)"

    def end(self, seconds: float) -> int:
        """Its exit status, where it ends within so many seconds."""
        self.told += self.process.communicate(timeout=seconds)[1]
        self.listening.join(10)
        return self.process.returncode


@pytest.fixture
def process(directory: Path, request: pytest.FixtureRequest) -> Iterator[Process]:
    running = Process(directory, *request.param)
    yield running
    running.process.kill()
    running.process.wait()


@pytest.mark.parametrize("process", [()], indirect=True)
def test_ctrl_c_twice_ends_it_at_once(process: Process) -> None:
    process.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.process.poll() is None and process.listening.is_alive()  # there are 30 s to finish
    process.process.send_signal(signal.SIGINT)
    assert process.end(3) == 130
    assert "Traceback" not in process.told and "30 s for what runs (1) to finish" in process.told


@pytest.mark.parametrize("process", [("--drain-seconds", "0.5")], indirect=True)
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_gives_time_to_finish(process: Process, sent: signal.Signals, status: int) -> None:
    process.process.send_signal(sent)
    assert process.end(4) == status and "Traceback" not in process.told, process.told
    assert (
        process.heard.endswith(b"\n\n") and b'event: error\ndata: {"error": {"message": "the server is' in process.heard
    )

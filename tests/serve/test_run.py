"""How `landmark serve` ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from .conftest import Process


class Listened(Process):
    """One client listens to an answer without end."""

    def __init__(self, directory: Path, *options: str) -> None:
        super().__init__(directory, *options)
        self.heard = b""
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


@pytest.fixture
def process(long: Path, request: pytest.FixtureRequest) -> Iterator[Listened]:
    with Listened(long, *request.param) as running:
        yield running


@pytest.mark.parametrize("process", [()], indirect=True)
def test_ctrl_c_twice_ends_it_at_once(process: Listened) -> None:
    process.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.process.poll() is None and process.listening.is_alive()  # there are 30 s to finish
    process.process.send_signal(signal.SIGINT)
    assert process.end(3) == 130
    assert "Traceback" not in process.told and "30 s for what runs (1) to finish" in process.told


@pytest.mark.parametrize("pause", [0.02, 0.25])
def test_ctrl_c_twice_where_nothing_runs(long: Path, pause: float) -> None:
    """The second one comes while the server ends, or the interpreter."""
    with Process(long) as running:
        httpx.get(running.url + "/health")
        running.process.send_signal(signal.SIGINT)
        time.sleep(pause)
        running.process.send_signal(signal.SIGINT)
        assert running.end(5) == 130 and "Traceback" not in running.told, running.told


@pytest.mark.parametrize("process", [("--drain-seconds", "0.5")], indirect=True)
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_gives_time_to_finish(process: Listened, sent: signal.Signals, status: int) -> None:
    process.process.send_signal(sent)
    assert process.end(4) == status and "Traceback" not in process.told, process.told
    process.listening.join(10)
    assert (
        process.heard.endswith(b"\n\n") and b'event: error\ndata: {"error": {"message": "the server is' in process.heard
    )

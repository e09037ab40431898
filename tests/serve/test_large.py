"""Large requests: they have bounds, and hold nobody else up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from landmark.serve.served import Served

from .conftest import Process, live, served
from .test_api import HELLO
from .test_limits import until

WORDS = "import os and the with statement "
CHAT = [{"role": "user", "content": WORDS * 3}] * 16_000
FORM = {
    "type": "json_schema",
    "json_schema": {
        "schema": {
            "$defs": {
                f"d{i}": {"type": "object", "properties": {"a": {"type": "string", "maxLength": i}}, "required": ["a"]}
                for i in range(12_000)
            },
            "anyOf": [{"$ref": f"#/$defs/d{i}"} for i in range(12_000)],
        }
    },
}
LARGE: dict[str, tuple[str, dict[str, Any], int, str | None]] = {
    "text": ("/tokenize", {"prompt": (WORDS * 40_000)[: 1 << 20]}, 200, None),
    "longer text": ("/tokenize", {"prompt": WORDS * 100_000}, 413, "prompt"),
    "ids": ("/detokenize", {"tokens": [300, 299, 298] * 340_000}, 200, None),
    "more ids": ("/detokenize", {"tokens": [30, 31] * 1_000_000}, 400, "tokens"),
    "chat": ("/tokenize", {"messages": CHAT}, 400, "messages"),
    "longer chat": ("/v1/chat/completions", {"messages": [*HELLO * 60_000]}, 400, "messages"),
    "prompt": ("/v1/completions", {"prompt": WORDS * 60_000}, 400, "prompt"),
    "prompts": ("/v1/completions", {"prompt": [WORDS * 100] * 1000, "max_tokens": 1}, 200, None),
    "schema": ("/v1/chat/completions", {"messages": HELLO, "response_format": FORM}, 400, "response_format"),
    "wrong ids": ("/v1/completions", {"prompt": [5] * 1_000_000 + ["x"]}, 400, "prompt.1000000"),
}


@pytest.fixture(scope="module")
def server(long: Path) -> Iterator[Process]:
    with Process(long, "--memory", "0.2") as running:
        httpx.post(running.url + "/v1/completions", json={"model": "long", "prompt": [5], "max_tokens": 1})
        yield running


@pytest.mark.parametrize("name", LARGE)
def test_a_large_request_holds_nobody_up(server: Process, name: str) -> None:
    path, body, status, param = LARGE[name]
    sent = json.dumps({"model": "long", **body}).encode()
    longest = []
    for _ in range(3):  # who else is on this machine may hold us up
        waits, answer = ask_beside(server.url, path, sent)
        assert answer.status_code == status, answer.text[:300]
        assert status == 200 or answer.json()["error"]["param"] == param
        longest.append(max(waits))
        if longest[-1] < 0.2:
            return
    raise AssertionError(f"others wait {min(longest):.3f} s")


def ask_beside(url: str, path: str, sent: bytes) -> tuple[list[float], httpx.Response]:
    """How long others wait for a small answer meanwhile, and the large one."""
    answers: list[httpx.Response] = []
    headers = {"content-type": "application/json"}
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(url + path, content=sent, headers=headers, timeout=60))
    )
    waits = []
    with httpx.Client(base_url=url, timeout=30) as client:
        client.get("/health")
        asking.start()
        while asking.is_alive():
            asked = time.perf_counter()
            assert client.get("/health").status_code == 200
            waits.append(time.perf_counter() - asked)
            time.sleep(0.005)
    return waits, answers[0]


def test_what_nobody_waits_for_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large requests wait for two threads, small ones with a form do not; whose client has left is not begun."""
    begun, go = [], threading.Event()

    def tokens(*_: Any) -> list[int]:
        begun.append(threading.current_thread().name)
        assert go.wait(30)
        return [5]

    monkeypatch.setattr(Served, "tokens", tokens)
    with live([served()]) as running:
        server = running.server.app.state.server

        def leave() -> None:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(running.url + "/tokenize", json={"model": "tiny", "prompt": "a" * 20_000}, timeout=1)

        threads = [threading.Thread(target=leave) for _ in range(6)]
        for thread in threads:
            thread.start()
        until(lambda: server.reading == 6)
        small = {"model": "tiny", "messages": HELLO, "response_format": {"type": "json_object"}, "max_tokens": 2}
        assert httpx.post(running.url + "/v1/chat/completions", json=small, timeout=20).status_code == 200
        for thread in threads:
            thread.join()
        until(lambda: server.reading == 0)
        go.set()
        assert httpx.post(running.url + "/tokenize", json={"model": "tiny", "prompt": "a" * 20_000}).status_code == 200
    assert len(begun) == 3 and all(name.startswith("reader") for name in begun)

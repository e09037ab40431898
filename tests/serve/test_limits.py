"""What stands before the server: keys, sizes, queues, time; and that nobody who leaves keeps his place."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from landmark.infer.engine import Engine
from landmark.serve.limits import Gate, Limits
from landmark.serve.served import Served

from .conftest import Live, live, served

ASK: dict[str, Any] = {"model": "tiny", "prompt": [5, 6, 7], "ignore_eos": True}


def until(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_keys() -> None:
    with live([served()], Limits(keys=("one", "two"))) as running:
        for key in ("one", "two"):
            assert OpenAI(base_url=running.url + "/v1", api_key=key).models.list().data
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
            OpenAI(base_url=running.url + "/v1", api_key="three").models.list()
        assert httpx.get(running.url + "/v1/models").status_code == 401
        assert httpx.get(running.url + "/metrics").status_code == 401
        assert httpx.get(running.url + "/health").status_code == 200


def test_bodies_that_are_too_large_or_too_slow() -> None:
    with live([served()], Limits(body=1000, patience=0.3)) as running:
        large = httpx.post(running.url + "/v1/completions", json={**ASK, "prompt": "x" * 2000})
        assert large.status_code == 413 and "1,000 at most" in large.json()["error"]["message"]
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in slow.recv(1000)


def test_a_rate() -> None:
    with live([served()], Limits(rate=3)) as running:
        answers = [httpx.get(running.url + "/v1/models") for _ in range(5)]
        assert [a.status_code for a in answers] == [200, 200, 200, 429, 429]
        assert 1 <= int(answers[-1].headers["Retry-After"]) <= 20


def test_a_full_queue() -> None:
    with live([served(max_batch=1)], Limits(queue=1)) as running:
        codes: list[int] = []

        def ask() -> None:
            codes.append(
                httpx.post(running.url + "/v1/completions", json={**ASK, "max_tokens": 400}, timeout=60).status_code
            )

        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        until(lambda: running.engine.stats().running == 1)
        threads[1].start()
        until(lambda: running.engine.stats().waiting >= 1)
        answer = httpx.post(running.url + "/v1/completions", json=ASK)
        assert (
            answer.status_code == 429
            and answer.headers["Retry-After"]
            and answer.json()["error"]["code"] == "queue_full"
        )
        for thread in threads:
            thread.join()
        assert codes == [200, 200]


def test_time_runs_out() -> None:
    with live([served()], Limits(timeout=0.05)) as running:
        answer = httpx.post(running.url + "/v1/completions", json={**ASK, "max_tokens": 500}, timeout=30)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        until(lambda: running.engine.stats().running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(stream: bool) -> None:
    with live([served(max_batch=2)]) as running:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                running.url + "/v1/completions", json={**ASK, "max_tokens": 500, "n": 2, "stream": False}, timeout=0.1
            ) if not stream else _leave_stream(running.url)
        until(lambda: running.engine.stats().running == 0)
        assert running.engine.stats().cancelled == 1
        assert httpx.post(running.url + "/v1/completions", json={**ASK, "max_tokens": 2}).status_code == 200


def _leave_stream(url: str) -> None:
    with httpx.stream("POST", url + "/v1/completions", json={**ASK, "max_tokens": 500, "stream": True}) as answer:
        for _ in zip(range(3), answer.iter_lines(), strict=False):
            pass
    raise httpx.ReadTimeout("left")


def test_a_client_that_has_left_before_the_stream_begins() -> None:
    with live([served()]) as running:
        asked = [{"type": "http.request", "body": json.dumps({**ASK, "max_tokens": 500, "stream": True}).encode()}]

        async def receive() -> dict[str, Any]:
            return asked.pop() if asked else {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            pass

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "POST", "path": "/v1/completions"}
        scope |= {"headers": [(b"content-type", b"application/json")], "query_string": b"", "root_path": ""}
        asyncio.run(running.server.config.app(scope, receive, send))  # type: ignore[operator, arg-type]
        until(lambda: running.engine.stats().cancelled == 1 and not running.engine.stats().running, 5)


def test_a_crash_of_the_engine_is_an_error_and_the_next_request_is_served() -> None:
    with live([served()]) as running:
        model: Any = running.engine.model
        plain, broken = model.hidden, [True]

        def hidden(*args: Any, **kwargs: Any) -> Any:
            if broken.pop() if broken else False:
                raise RuntimeError("out of luck")
            return plain(*args, **kwargs)

        model.hidden = hidden
        try:
            answer = httpx.post(running.url + "/v1/completions", json=ASK)
            assert answer.status_code == 500 and "out of luck" in answer.json()["error"]["message"]
            assert httpx.post(running.url + "/v1/completions", json=ASK).status_code == 200
        finally:
            del model.hidden


FAILED = {"message": "the server failed: RuntimeError", "type": "api_error", "param": None, "code": "internal_error"}


@pytest.mark.parametrize("where", ["the prompt", "the gate"])
def test_after_a_failure_the_connection_goes_on(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def breaks(*_: Any) -> Any:
        monkeypatch.undo()
        raise RuntimeError("out of luck")

    with live([served()]) as running:
        host, port = running.url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        connection.connect()
        mine = connection.sock.getsockname()
        monkeypatch.setattr(*((Served, "prompts") if where == "the prompt" else (Gate, "_check_rate")), breaks)
        for status in (500, 200):
            asked = json.dumps({**ASK, "max_tokens": 1})
            connection.request("POST", "/v1/completions", asked, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            body = json.load(answer)
            assert answer.status == status and (status == 200 or body == {"error": FAILED})
            assert connection.sock is not None and connection.sock.getsockname() == mine
        assert 'status="500"} 1.0' in httpx.get(running.url + "/metrics").text


def test_a_failure_within_a_stream_is_told_and_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> Any:
        if not names:
            monkeypatch.undo()
            raise RuntimeError("out of luck")
        return names.pop()

    names = ["a", "b", "c"]
    monkeypatch.setattr(Served, "token_text", breaks)
    with live([served()]) as running:
        answer = httpx.post(running.url + "/v1/completions", json={**ASK, "stream": True, "logprobs": 0})
        *said, last = answer.text.strip().split("\n\n")
        assert answer.status_code == 200 and len(said) > 1
        assert last == "event: error\ndata: " + json.dumps({"error": FAILED})
        until(lambda: running.engine.stats().running == 0)


def test_an_engine_that_has_ended_is_told_and_seen() -> None:
    with live([served()]) as running:
        engine: Any = running.engine

        def breaks() -> None:
            raise MemoryError("no room at all")

        engine._begin = engine._scheduler.plan = breaks
        answer = httpx.post(running.url + "/v1/completions", json=ASK)
        assert answer.status_code == 500 and "no room at all" in answer.json()["error"]["message"]
        until(lambda: httpx.get(running.url + "/health").status_code == 503)
        answer = httpx.post(running.url + "/v1/completions", json=ASK)
        assert answer.status_code == 503 and "restarted" in answer.json()["error"]["message"]


def test_what_runs_is_finished_before_the_end() -> None:
    with live([served()]) as running:
        answers: list[httpx.Response] = []
        ask = threading.Thread(
            target=lambda: answers.append(
                httpx.post(running.url + "/v1/completions", json={**ASK, "max_tokens": 200}, timeout=60)
            )
        )
        ask.start()
        until(lambda: running.engine.stats().running == 1)
        running.server.should_exit = True
        ask.join()
        assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 200


@contextmanager
def slow(engine: Engine, seconds: float) -> Iterator[None]:
    """Within, each step takes so long."""
    model: Any = engine.model
    plain = model.hidden

    def hidden(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return plain(*args, **kwargs)

    model.hidden = hidden
    try:
        yield
    finally:
        del model.hidden


def test_what_is_not_finished_by_the_end_is_told_so() -> None:
    with live([served()], Limits(drain=0.3)) as running, slow(running.engine, 0.02):
        long = {**ASK, "max_tokens": 500}
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(
                target=lambda s=s: answers.append(
                    httpx.post(running.url + "/v1/completions", json={**long, "stream": s}, timeout=60)
                )
            )
            for s in (False, True)
        ]
        for thread in threads:
            thread.start()
        until(lambda: running.engine.stats().running == 2)
        time.sleep(0.2)
        running.server.should_exit = True
        for thread in threads:
            thread.join()
        streamed, whole = sorted(answers, key=lambda answer: answer.status_code)
        due = {"message": "the server is shutting down", "type": "service_unavailable_error", "param": None}
        due["code"] = "shutting_down"
        assert whole.status_code == 503 and whole.json() == {"error": due} and whole.headers["Retry-After"]
        assert streamed.status_code == 200
        *said, last = streamed.text.strip().split("\n\n")
        assert len(said) > 3 and all(piece.startswith("data: {") for piece in said)
        event, data = last.split("\n")
        assert event == "event: error" and json.loads(data.removeprefix("data: ")) == {"error": due}
        until(lambda: running.engine.stats().cancelled + running.engine.stats().failed == 2)  # or stopped before that


def test_who_reads_nothing_is_cut_off(capfd: pytest.CaptureFixture[str]) -> None:
    """Its place is free after the request's time, and nothing is left for the event loop to close."""
    with live([served()], Limits(timeout=2)) as running, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = running.url.removeprefix("http://").split(":")
        deaf.connect((host, int(port)))
        asked = json.dumps({**ASK, "max_tokens": 400, "stream": True, "logprobs": 20, "n": 16}).encode()
        header = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(asked)}\r\n\r\n".encode()
        deaf.sendall(b"POST /v1/completions HTTP/1.1\r\n" + header + asked)
        until(lambda: bool(running.server.server_state.tasks))
        until(lambda: not running.server.server_state.tasks, 20)
        assert running.engine.stats().running == 0
    told = capfd.readouterr().err
    assert "without completing response" in told and "Traceback" not in told, told


def test_what_takes_too_long_is_not_asked_again() -> None:
    with live([served()], Limits(timeout=0.1)) as running, slow(running.engine, 0.02):
        client = OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=2)
        with pytest.raises(openai.InternalServerError, match="no answer within"):
            client.completions.create(model="tiny", prompt=[5], max_tokens=400, extra_body={"ignore_eos": True})
        assert (
            'landmark_requests_total{path="/v1/completions",status="504"} 1.0'
            in httpx.get(running.url + "/metrics").text
        )


def test_the_client_sees_what_ends_a_stream() -> None:
    with live([served()], Limits(timeout=0.3)) as running, slow(running.engine, 0.02):
        pieces = OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0).completions.create(
            model="tiny", prompt=[5, 6, 7], max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        with pytest.raises(openai.APIError, match="no answer within") as caught:
            list(pieces)
        assert caught.value.code == "timeout" and caught.value.type == "timeout_error"


@pytest.mark.parametrize("name", ["body", "queue", "timeout"])
def test_limits_that_mean_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"the limit '{name}' is 0"):
        Limits(**{name: 0})  # type: ignore[arg-type]


def test_what_is_there_before_the_first_request_is_not_looked_through_again() -> None:
    """A full collection of garbage would stop all answers; models are none."""
    with live([served()]):
        assert gc.get_freeze_count() > 10_000
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("keys", [("",), ("secret", " ")])
def test_an_empty_key_is_none(keys: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="an API key is empty"):
        Limits(keys=keys)


def test_a_key_of_any_letters() -> None:
    with live([served()], Limits(keys=("schlüssel",))) as closed:
        for given, status in (("schlüssel", 200), ("schlussel", 401)):
            header = b"Bearer " + given.encode()
            assert httpx.get(f"{closed.url}/v1/models", headers=[(b"authorization", header)]).status_code == status


def test_a_form_that_is_too_large_is_refused_and_nobody_else_notices() -> None:
    names = {f"SECRET_{i}": {"type": "integer"} for i in range(600)}
    schema = {"type": "object", "additionalProperties": False, "properties": names}
    form = {"type": "json_schema", "json_schema": {"name": "large", "schema": schema}}
    with live([served()]) as open_:
        post = lambda **body: httpx.post(
            f"{open_.url}/v1/completions", json={**ASK, "ignore_eos": False, **body}, timeout=60
        )
        refused = post(response_format=form)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "invalid_form"
        assert "SECRET" not in refused.text and open_.engine.stats().crashes == 0
        assert post(max_tokens=3).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "a\ud800b"}, "prompt"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a\ud800b"}]}, "messages"),
        ("embeddings", {"model": "vectors", "input": "a\ud800b"}, "input"),
        ("embeddings", {"model": "vectors", "input": "word " * 3000}, "input"),
        ("completions", {"prompt": ["a"] * 300, "n": 10}, "n"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tools": []}},
         "chat_template_kwargs"),
        ("completions", {"prompt": "word " * 10_000}, "prompt"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_the_clients_mistake(tiny: Live, path: str, body: Any, param: str) -> None:
    raw = json.dumps({"model": "tiny", **body})
    answer = httpx.post(f"{tiny.url}/v1/{path}", content=raw, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_tokenize_refuses_half_a_character(tiny: Live) -> None:
    raw = b'{"model": "tiny", "prompt": "a\\ud800"}'
    answer = httpx.post(f"{tiny.url}/tokenize", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "half a character" in answer.json()["error"]["message"]

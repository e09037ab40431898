"""The soak: a short one of a real server, and that it sees what it is there to see."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

import landmark
from landmark.cli.main import app
from landmark.serve import traffic
from landmark.serve.app import TRIM_EVERY
from landmark.serve.soak import LONGEST_REST, Figures, Seen, Soak, report, serving
from landmark.serve.soak import soak as run
from landmark.serve.traffic import KINDS, Target, Wrong, said, said_in_pieces

from .conftest import Live, live, model_and_tokenizer, served


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = model_and_tokenizer()
    where = tmp_path_factory.mktemp("soak") / "tiny"
    landmark.save(model, where)
    tokenizer.save(where)
    return where


def test_a_server_lasts_a_moment(directory: Path, tmp_path: Path) -> None:
    """All but the memory, which takes minutes to be full."""
    arguments = ["bench", "soak", str(directory), "--minutes", "0.05", "--clients", "6", "--memory", "0.001"]
    made = CliRunner().invoke(app, [*arguments, "--checked", "20", "--out", str(tmp_path / "soak.json")])
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["requests_in_all"] > 10 and 3 < found["checked"] <= 20
    assert list(found["criteria"].values())[:3] == [True, True, True], (found["wrong"], found["differing"])
    assert made.exit_code == (0 if found["passed"] else 1)
    assert "requests" in made.output


def test_every_kind_of_client(tiny: Live) -> None:
    async def all_kinds() -> None:
        async with httpx.AsyncClient(base_url=tiny.url, timeout=60) as client:
            target, draw = await Target.find(client, "tiny"), random.Random(1)
            assert target.vectors == "vectors" and target.room >= 64
            for kind in KINDS:
                if (asked := await kind(target, draw)) is not None:
                    assert await target.ask(asked.path, {**asked.body, "stream": False}) == asked.said, kind.__name__
            for path, body, due in traffic.bad_requests(target, draw):
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                answer = await client.post(path, content=content, headers={"Content-Type": "application/json"})
                assert answer.status_code == due, (path, content[:200], answer.text)

    asyncio.run(all_kinds())


def test_it_sees_a_wrong_answer_and_a_failure() -> None:
    with live([served()]) as running:
        model: Any = running.engine.model
        plain, calls = model.hidden, [0]

        def hidden(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == 40:
                raise RuntimeError("out of luck")
            return plain(*args, **options) * (-1.0 if calls[0] % 7 == 0 else 1.0)

        model.hidden = hidden
        try:
            found = asyncio.run(run(running.url, Soak(minutes=0.03, clients=4, checked=20)))
        finally:
            del model.hidden
    assert not found["passed"] and found["differing"] and any("out of luck" in line for line in found["wrong"])
    assert list(found["criteria"].values())[:2] == [False, False]


def test_the_verdict_on_memory() -> None:
    engine = {"running": 0.0, "waiting": 0.0, "used": 0.0, "crashes": 0.0, "failed": 0.0}

    def grown(share: float, used: float = 0.0) -> dict[str, Any]:
        busy = [Figures(float(n), 9e8 * (1 + n % 7), 9, 0, engine) for n in range(100)]
        rests = [Figures(20.0 * n, 4e8 * (1 + share * n / 4), 9, 0, engine) for n in range(5)]
        seen = Seen(figures=busy, rests=rests)
        last = Figures(101.0, 4e8, 9, 0, engine | {"used": used})
        return report(Soak(minutes=100 / 60), seen, last, 1, 0, [])

    assert grown(0.005)["passed"] and abs(grown(0.005)["memory_growth"] - 0.005) < 1e-9
    assert grown(0.0)["memory_mib"] == {"at_rest": [4e8 / 2**20] * 5, "most": 63e8 / 2**20}
    assert not grown(0.1)["passed"]
    assert not grown(0.0, used=0.1)["passed"]


def test_what_is_said_whole_and_in_pieces() -> None:
    call = {"id": "x", "function": {"name": "look", "arguments": "{}"}}
    whole = {
        "choices": [{"message": {"content": None, "tool_calls": [call]}, "token_ids": [1, 2], "finish_reason": "stop"}]
    }
    first = {"index": 0, "id": "y", "function": {"name": "look", "arguments": ""}}
    pieces = [
        {"index": 0, "delta": {"tool_calls": [first]}, "token_ids": [1], "finish_reason": None},
        {"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}, "finish_reason": None},
        {"index": 0, "delta": {}, "token_ids": [2], "finish_reason": "stop"},
    ]
    assert (
        said(whole)
        == said_in_pieces([{"choices": [piece]} for piece in pieces])
        == [["", [["look", "{}"]], [1, 2], "stop"]]
    )
    with pytest.raises(Wrong, match="no luck"):
        said_in_pieces([{"error": {"message": "no luck"}}])


def test_bad_input(tiny: Live, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="minutes is 0"):
        Soak(minutes=0)
    assert TRIM_EVERY < LONGEST_REST == Soak(minutes=10).rest and Soak(minutes=0.1).rest == 0.25
    assert TRIM_EVERY < LONGEST_REST == Soak(minutes=10).rest and Soak(minutes=0.1).rest == 0.25
    with pytest.raises(ValueError, match=r"the server did not start: .*nowhere"), serving([str(tmp_path / "nowhere")]):
        pass
    with pytest.raises(ValueError, match="no decoder vectors"):
        asyncio.run(run(tiny.url, Soak(minutes=0.01), model="vectors"))
    made = CliRunner().invoke(app, ["bench", "soak"])
    assert isinstance(made.exception, ValueError) and "either models to serve" in str(made.exception)

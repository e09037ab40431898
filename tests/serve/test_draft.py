"""`landmark serve --draft lookup|own|DIR`: the same answers, and figures of what was guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

import landmark
from landmark.cli.serve import open_served
from landmark.infer.speculative.pace import Cost
from landmark.serve.served import Served

from .conftest import live, model_and_tokenizer


@pytest.mark.parametrize("way", ["lookup", "a model"])
def test_serving_ahead(tmp_path: Path, way: str) -> None:
    model, tokenizer = model_and_tokenizer()
    landmark.save(model, tmp_path)
    tokenizer.save(tmp_path)
    how: Any = (None, None, "cpu", 1 << 24, 8, 64)
    drafts = {"a": None, "b": "lookup" if way == "lookup" else str(tmp_path)}
    plain, ahead = (open_served(f"{name}={tmp_path}", *how, draft) for name, draft in drafts.items())
    assert isinstance(plain, Served) and isinstance(ahead, Served)
    ahead.engine._scheduler._cost = Cost(guess=0.1)  # as if the model that drafts were small
    ask = {"prompt": "one two three " * 8, "max_tokens": 60, "seed": 5, "temperature": 0.3, "logprobs": 1}
    with live([plain, ahead]) as server:
        for bias in ({}, {"40": 60, "41": 60}):
            a, b = (
                httpx.post(f"{server.url}/v1/completions", json={**ask, "logit_bias": bias, "model": name}).json()
                for name in "ab"
            )
            assert a["choices"][0]["text"] == b["choices"][0]["text"] and a["usage"] == b["usage"]
        stats = httpx.get(f"{server.url}/stats").json()
        metrics = httpx.get(f"{server.url}/metrics").text
    assert stats["a"]["proposed"] == 0 < stats["b"]["kept"] <= stats["b"]["proposed"]
    assert f'landmark_engine_kept_total{{model="b"}} {stats["b"]["kept"]:.1f}' in metrics


def test_what_cannot_draft(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    landmark.save(model, tmp_path)
    tokenizer.save(tmp_path)
    how: Any = (None, None, "cpu", 1 << 24, 8, 64)
    with pytest.raises(ValueError, match="this model has no drafts"):
        open_served(str(tmp_path), *how, "own")
    with pytest.raises(ValueError, match="nowhere"):
        open_served(str(tmp_path), *how, str(tmp_path / "nowhere"))

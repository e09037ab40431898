"""`landmark serve --draft lookup`: the same answers, and figures of what was guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

import landmark
from landmark.cli.serve import open_served
from landmark.serve.served import Served

from .conftest import live, model_and_tokenizer


def test_serving_ahead(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer()
    landmark.save(model, tmp_path)
    tokenizer.save(tmp_path)
    how: Any = (None, None, "cpu", 1 << 24, 8, 64)
    plain, ahead = (open_served(f"{name}={tmp_path}", *how, draft) for name, draft in (("a", None), ("b", "lookup")))
    assert isinstance(plain, Served) and isinstance(ahead, Served)
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

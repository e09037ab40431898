"""Load for a server, and what it feels like: requests that arrive at random, timed as a client sees them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from ..weights.files import beside

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Load:
    """`rate` requests a second on average (Poisson arrivals; inf: all at once); prompts of `prompt` tokens, the first
    `shared` of them equal in all; answers of `answer` tokens."""

    requests: int = 100
    rate: float = 4.0
    prompt: int = 128
    shared: int = 0
    answer: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "rate", "prompt", "answer"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.shared <= self.prompt:
            raise ValueError(f"shared is {self.shared}; it is a part of the prompt's {self.prompt} tokens")

    def prompts(self, vocab: int) -> list[list[int]]:
        """Random token ids."""
        draw = random.Random(self.seed)
        common = [draw.randrange(vocab) for _ in range(self.shared)]
        return [
            common + [draw.randrange(vocab) for _ in range(self.prompt - self.shared)] for _ in range(self.requests)
        ]

    def arrivals(self) -> list[float]:
        """Seconds from the start."""
        draw, now, times = random.Random(self.seed + 1), 0.0, []
        for _ in range(self.requests):
            times.append(now)
            now += draw.expovariate(self.rate) if self.rate != float("inf") else 0.0
        return times


@dataclass
class Timing:
    """One request: seconds from sending to each token; `error` if it failed."""

    sent: float
    tokens: list[float] = field(default_factory=list)
    error: str | None = None


async def drive(url: str, model: str, load: Load, *, vocab: int, key: str | None = None) -> list[Timing]:
    """Send the load to a server of OpenAI's protocol, and time it."""
    began = time.perf_counter()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=None, limits=limits) as client:

        async def one(prompt: list[int], at: float) -> Timing:
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            body = {"model": model, "prompt": prompt, "max_tokens": load.answer, "stream": True, "ignore_eos": True}
            timing, sent = Timing(time.perf_counter() - began), time.perf_counter()
            try:
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    if answer.status_code != 200:
                        timing.error = f"{answer.status_code}: {(await answer.aread()).decode()[:200]}"
                        return timing
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {"):
                            if '"error"' in line:
                                timing.error = line[6:200]
                            timing.tokens.append(time.perf_counter() - sent)
            except httpx.HTTPError as error:
                timing.error = f"{type(error).__name__}: {error}"
            return timing

        tasks = [one(prompt, at) for prompt, at in zip(load.prompts(vocab), load.arrivals(), strict=True)]
        return await asyncio.gather(*tasks)


def summary(load: Load, timings: list[Timing]) -> dict[str, Any]:
    """Percentiles in milliseconds, and throughput."""
    good = [t for t in timings if t.error is None and t.tokens]
    first = [t.tokens[0] for t in good]
    between = [b - a for t in good for a, b in zip(t.tokens, t.tokens[1:], strict=False)]
    whole = [t.tokens[-1] for t in good]
    span = max((t.sent + t.tokens[-1] for t in good), default=0.0)
    tokens = sum(len(t.tokens) for t in good)
    return {
        "load": asdict(load),
        "finished": len(good),
        "failed": len(timings) - len(good),
        "errors": sorted({t.error for t in timings if t.error})[:5],
        "seconds": span,
        "tokens_per_s": tokens / span if span else 0.0,
        "requests_per_s": len(good) / span if span else 0.0,
        "time_to_first_token_ms": percentiles(first),
        "time_between_tokens_ms": percentiles(between),
        "request_ms": percentiles(whole),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    found = {f"p{p}": 1000 * float(np.percentile(seconds, p)) for p in PERCENTILES}
    return {"mean": 1000 * float(np.mean(seconds)), **found, "max": 1000 * max(seconds)}


def write(folder: Path, report: dict[str, Any], timings: list[Timing]) -> None:
    """load.json, and load.png: the times to the first token and between tokens as distributions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    with beside(folder / "load.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2))
    good = [t for t in timings if t.error is None and t.tokens]
    kinds = {
        "to the first token": [t.tokens[0] for t in good],
        "between tokens": [b - a for t in good for a, b in zip(t.tokens, t.tokens[1:], strict=False)],
    }
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, values in kinds.items():
        if values:
            x = np.sort(np.asarray(values) * 1000)
            axes.plot(x, np.arange(1, len(x) + 1) / len(x), label=name)
    axes.set(xscale="log", xlabel="milliseconds", ylabel="share of requests or tokens", ylim=(0, 1))
    axes.set_title(f"{report['finished']} requests, {report['tokens_per_s']:.0f} tokens/s", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with beside(folder / "load.png") as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)

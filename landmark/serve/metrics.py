"""Figures of a server for Prometheus: what the engines count, how long requests take, what the process holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from .limits import Message, Receive, Send
from .served import Served, ServedEncoder

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAUGES = ("running", "waiting", "used")


class Engines:
    """A collector: the engines' own figures, read when they are asked for."""

    def __init__(self, models: Mapping[str, Served | ServedEncoder]) -> None:
        self.models = models

    def collect(self) -> Iterable[Any]:
        stats = {name: s.engine.stats() for name, s in self.models.items() if isinstance(s, Served) and not s.base}
        names = [f.name for f in dataclasses.fields(next(iter(stats.values())))] if stats else []
        for name in names:
            family = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
            metric = family(f"landmark_engine_{name}", f"engine: {name.replace('_', ' ')}", labels=["model"])
            for model, figures in stats.items():
                metric.add_metric([model], float(getattr(figures, name)))
            yield metric


class Metrics:
    """One server's; `requests` by path and status."""

    def __init__(self, models: Mapping[str, Served | ServedEncoder]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(Engines(models))
        ProcessCollector(registry=self.registry)
        self.requests = Counter("landmark_requests", "requests", ["path", "status"], registry=self.registry)
        self.first = Histogram(
            "landmark_time_to_first_token_seconds", "from a request's arrival to its first token", ["model"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.between = Histogram(
            "landmark_time_between_tokens_seconds", "between tokens of one answer", ["model"], buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.whole = Histogram(
            "landmark_request_seconds", "from a request's arrival to its last token", ["model"], buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Counted:
    """An ASGI application around another one, whose answers it counts."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, told)

"""Does a server last? Mixed traffic for a while, and then: no failure, no wrong answer, nothing kept, memory flat.

What is resident under traffic goes up and down with the bodies that happen to be on their way. A leak raises what is
resident at rest: now and then the traffic stops for as long as a server takes to give free memory back.

report = asyncio.run(soak(url, Soak(minutes=10)))
with serving(["runs/quickstart"], ["--memory", "0.05"]) as url: ...         # a server in a process of its own
"""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from .traffic import Asked, Kind, Target, Wrong, kinds

Tell = Callable[[float, str], None]
GROWTH = 0.02  # of resident memory at rest, between the end of the warm-up and the end
RESTS = 4  # from the end of the warm-up on, and one more at the end
LONGEST_REST = 25.0  # seconds, more than app.TRIM_EVERY


@dataclass(frozen=True)
class Soak:
    """`clients` come one after the other, each `clients` at once, for `minutes`, rests included; the first `warm` share
    of them does not count for memory. `checked` answers at most are asked for a second time, alone."""

    minutes: float = 10.0
    clients: int = 16
    warm: float = 0.2
    checked: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("minutes", "clients", "checked"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.warm < 0.9:
            raise ValueError(f"warm is {self.warm}; it is a share of the time below 0.9")

    @property
    def rest(self) -> float:
        """Seconds of each."""
        return min(LONGEST_REST, 60 * self.minutes / (6 * RESTS))


@dataclass
class Figures:
    """What /metrics says at one time; bytes are those of the server's process."""

    seconds: float
    bytes: float
    files: float
    failed: float  # answers with a status of 500 or more
    engine: dict[str, float]

    @classmethod
    def read(cls, text: str, seconds: float) -> Figures:
        found: defaultdict[str, float] = defaultdict(float)
        failed = 0.0
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] += sample.value
                if sample.name == "landmark_requests_total" and sample.labels["status"] >= "500":
                    failed += sample.value
        prefix = "landmark_engine_"
        engine = {n.removeprefix(prefix).removesuffix("_total"): v for n, v in found.items() if n.startswith(prefix)}
        return cls(seconds, found["process_resident_memory_bytes"], found["process_open_fds"], failed, engine)

    @property
    def idle(self) -> bool:
        return not self.engine["running"] and not self.engine["waiting"]


@dataclass
class Seen:
    """What came of the traffic."""

    requests: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    kept: list[Asked] = field(default_factory=list)  # a fair draw of the answers that can be checked
    answers: int = 0
    figures: list[Figures] = field(default_factory=list)
    rests: list[Figures] = field(default_factory=list)  # of each, when least was resident


async def soak(
    url: str, wanted: Soak, *, model: str | None = None, key: str | None = None, tell: Tell | None = None
) -> dict[str, Any]:
    """Send the traffic, check, and report; `report["passed"]` is the verdict. `tell(seconds, line)` hears how
    it goes."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=wanted.clients)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120, limits=limits) as client:
        target = await Target.find(client, model)
        seen, began, open_ = Seen(), time.monotonic(), asyncio.Event()
        end = began + 60 * wanted.minutes
        possible = kinds(target)
        open_.set()

        async def visits(number: int) -> None:
            draw = random.Random(wanted.seed * 1000 + number)
            while await open_.wait() and time.monotonic() < end:
                [kind] = draw.choices(list(possible), list(possible.values()))
                await _visit(target, kind, draw, seen, wanted)

        async def watch() -> None:
            every = min(5.0, 60 * wanted.minutes / 50)
            while time.monotonic() < end:
                seen.figures.append(await _figures(client, began))
                if tell is not None:
                    tell(seen.figures[-1].seconds, _line(seen))
                await asyncio.sleep(every)

        async def rests() -> None:
            for n in range(RESTS):
                due = 60 * wanted.minutes * (wanted.warm + (1 - wanted.warm) * n / RESTS)
                await asyncio.sleep(began + due - time.monotonic())
                open_.clear()
                seen.rests.append(await _rest(client, began, wanted.rest))
                open_.set()

        await asyncio.gather(watch(), rests(), *(visits(n) for n in range(wanted.clients)))
        idle = await _until_idle(client, began)
        seen.rests.append(await _rest(client, began, wanted.rest))
        checked, rounded, differing = 0, 0, []
        for asked in seen.kept:
            if tell is not None:
                tell(time.monotonic() - began, f"{checked} of {len(seen.kept)} answers asked for again, alone")
            again = await target.ask(asked.path, {**asked.body, "stream": False})
            checked += 1
            if again != asked.said:
                if await by_rounding(target, asked, again):
                    rounded += 1
                else:
                    differing.append({**asdict(asked), "alone": again})
        last = await _until_idle(client, began)
    return report(wanted, seen, idle and last, checked, rounded, differing)


async def by_rounding(target: Target, asked: Asked, alone: Any) -> bool:
    """Whether a draw lay so near the edge between two tokens that the last bits decided it: the first token that
    differs is another one again if the temperature, or the token's bias where nothing is drawn, changes by 1e-4."""
    if len(alone) != len(asked.said):
        return False
    (_, _, said, _), (_, _, own, _) = next(pair for pair in zip(asked.said, alone, strict=True) if pair[0] != pair[1])
    at = next((n for n, (a, b) in enumerate(zip(said, own, strict=False)) if a != b), None)
    if at is None:
        return False
    heat = asked.body["temperature"]
    for change in (1e-5, -1e-5, 1e-4, -1e-4):
        if heat:
            changed: dict[str, Any] = {"temperature": heat * (1 + change)}
        else:
            changed = {"logit_bias": {str(said[at]): abs(change)}}
        answers = await target.ask(asked.path, {**asked.body, "stream": False, **changed})
        tokens = [answer[2] for answer in answers]
        if any(len(t) > at and t[:at] == own[:at] and t[at] != own[at] for t in tokens) and own not in tokens:
            return True
    return False


async def _visit(target: Target, kind: Kind, draw: random.Random, seen: Seen, wanted: Soak) -> None:
    name = kind.__name__
    seen.requests[name] += 1
    try:
        asked = await kind(target, draw)
    except (Wrong, httpx.HTTPError, OSError, ValueError, KeyError) as error:
        seen.wrong.append(f"{name}: {type(error).__name__}: {error}")
        await asyncio.sleep(0.1)  # a server that is gone is not to be run into
        return
    if asked is not None:
        seen.answers += 1
        if len(seen.kept) < wanted.checked:
            seen.kept.append(asked)
        elif (place := draw.randrange(seen.answers)) < wanted.checked:
            seen.kept[place] = asked


async def _figures(client: httpx.AsyncClient, began: float) -> Figures:
    return Figures.read((await client.get("/metrics")).text, time.monotonic() - began)


async def _until_idle(client: httpx.AsyncClient, began: float, patience: float = 30.0) -> Figures | None:
    """The figures once nothing runs; None where something does for ever."""
    end = time.monotonic() + patience
    while not (figures := await _figures(client, began)).idle:
        if time.monotonic() > end:
            return None
        await asyncio.sleep(0.2)
    return figures


async def _rest(client: httpx.AsyncClient, began: float, seconds: float) -> Figures:
    """Without traffic for so long: when least was resident."""
    await _until_idle(client, began)
    end, found = time.monotonic() + seconds, [await _figures(client, began)]
    while time.monotonic() < end:
        await asyncio.sleep(min(1.0, seconds / 4))
        found.append(await _figures(client, began))
    return min(found, key=lambda figures: figures.bytes)


def _line(seen: Seen) -> str:
    now = seen.figures[-1]
    told = f"{sum(seen.requests.values())} requests, {now.engine['running']:.0f} running, {now.bytes / 2**20:.0f} MiB"
    return told + (f", {len(seen.wrong)} wrong" if seen.wrong else "")


def report(
    wanted: Soak, seen: Seen, last: Figures | None, checked: int, rounded: int, differing: list[Any]
) -> dict[str, Any]:
    """Figures, and of each criterion whether it is met."""
    first, final = seen.rests[0], seen.rests[-1]
    growth = final.bytes / first.bytes - 1 if first.bytes else None
    end = last or seen.figures[-1]
    tasks = sum(seen.requests.values())
    criteria = {
        "nothing failed": not seen.wrong and not end.failed and not end.engine["crashes"] and not end.engine["failed"],
        "every answer checked is what it is alone": checked > 0 and not differing,
        "nothing runs or is held at the end": last is not None and last.engine["used"] == 0,
        f"resident memory at rest grows by {GROWTH:.0%} at most": growth is not None and growth <= GROWTH,
    }
    return {
        "soak": asdict(wanted), "passed": all(criteria.values()), "criteria": criteria,
        "requests": dict(seen.requests.most_common()), "requests_in_all": tasks, "wrong": seen.wrong[:20],
        "answers": seen.answers, "checked": checked, "by_rounding": rounded, "differing": differing[:5],
        "memory_growth": growth,
        "memory_mib": {
            "at_rest": [rest.bytes / 2**20 for rest in seen.rests], "most": max(f.bytes for f in seen.figures) / 2**20,
        },
        "files": [first.files, end.files], "engine": end.engine,
        "samples": [[f.seconds, f.bytes, f.files, f.engine["running"]] for f in seen.figures],
    }  # fmt: skip


@contextmanager
def serving(models: Sequence[str], options: Sequence[str] = (), patience: float = 180.0) -> Iterator[str]:
    """The address of a server in a process of its own. Raises ValueError where it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "landmark.cli.main", "serve", *models, "--port", str(port), *options]
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + patience
    with tempfile.TemporaryFile() as told:
        server = subprocess.Popen(command, stdout=told, stderr=told)
        try:
            while not _answers(url):
                if server.poll() is not None or time.monotonic() > end:
                    told.seek(0)
                    raise ValueError(
                        f"the server did not start: {told.read().decode(errors='replace').strip()[-2000:]}"
                    )
                time.sleep(0.1)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False

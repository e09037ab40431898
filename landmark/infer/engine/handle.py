"""Where a request's events arrive: an iterator, an asynchronous one, or a list of answers."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING

from ..generate import Answer, Event
from .request import Scored, Ticket

if TYPE_CHECKING:
    from .engine import Engine


class EngineError(RuntimeError):
    """A request failed for no fault of its own."""


class Handle:
    """A request on its way. Iterate over its events (also with `async for`), or wait for its `result`.

    `cached` tokens of the prompt were remembered and not computed. `prompt_logprobs`, if they were asked for, is there
    with the first event: for every token of the prompt but the first itself with its log-probability, and the likeliest
    tokens with theirs.
    """

    def __init__(self, engine: Engine, ticket: Ticket) -> None:
        self._engine, self._ticket = engine, ticket
        self.request = ticket.request
        self.cached = 0
        self.cancelled = False
        self.error: str | None = None
        self.done = False  # everything it will give is there
        self._events: deque[Event] = deque()
        self._arrived = threading.Condition()
        self._awaited = 0  # threads that wait, or are about to look once more whether they have to
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def prompt_logprobs(self) -> list[tuple[Scored, tuple[Scored, ...]]]:
        return self._ticket.scored

    def cancel(self) -> None:
        """Stop it before the next step; the iteration ends with the events that are there."""
        self._engine.cancel(self)

    def __iter__(self) -> Iterator[Event]:
        """Raises EngineError where the engine could not finish it. Drives the engine, if no thread does."""
        while True:
            if self._events:
                yield self._events.popleft()
            elif self._over():
                return
            elif self._engine.running:
                with self._arrived:
                    self._awaited += 1
                    self._arrived.wait_for(lambda: self._events or self.done or not self._engine.running)
                    self._awaited -= 1
            else:
                self._engine.step()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The same, for an engine that a thread drives."""
        if not self._engine.running and not self.done:
            raise ValueError("an engine that answers asynchronously needs its thread: call start() first")
        arrived = asyncio.Event()
        self._waiter = (asyncio.get_running_loop(), arrived)
        while True:
            arrived.clear()
            while self._events:
                yield self._events.popleft()
            if self._over():
                return
            if not self._events and not self.done:
                await arrived.wait()

    def result(self) -> list[Answer]:
        """All answers, when they are finished. An answer that was cut short by `cancel` has finished with "length"."""
        written = self._engine.tokenizer is not None
        logged = self.request.logprobs is not None
        answers = [Answer([], "" if written else None, [] if logged else None, "length") for _ in range(self.request.n)]
        for event in self:
            answers[event.index].add(event)
        return answers

    def _over(self) -> bool:
        if not self.done or self._events:
            return False
        if self.error is not None:
            raise EngineError(self.error)
        return True

    def put(self, events: Iterable[Event], done: bool) -> tuple[asyncio.AbstractEventLoop, asyncio.Event] | None:
        """The engine's end; returns who is to be woken in an event loop. Who waits says so first and looks then; here
        it is the other way round, so nobody waits for what is there, and a lock is taken for those who wait only."""
        self._events.extend(events)
        self.done = self.done or done
        if self._awaited:
            with self._arrived:
                self._arrived.notify_all()
        return self._waiter


def wake(waiters: Iterable[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    """One call into each event loop, however many wait in it. A loop that is closed has nobody left in it."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for loop, arrived in waiters:
        loops.setdefault(loop, []).append(arrived)
    for loop, all_arrived in loops.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_set_all, all_arrived)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()

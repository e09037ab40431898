"""How long requests may take: each its own time, and all of them until the server ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .errors import ApiError


class Deadlines:
    """`seconds` for each request; after `drain` no more than those for all that are on their way."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end: float | None = None  # the event loop's time by which the server ends
        self._running: set[asyncio.Timeout] = set()

    @property
    def draining(self) -> bool:
        return self._end is not None

    @asynccontextmanager
    async def within(self) -> AsyncIterator[None]:
        """The work inside ends in time: as an ApiError, 504 where it was too slow, 503 where the server ends."""
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(self._by(began + self.seconds)) as limit:
                self._running.add(limit)
                try:
                    yield
                finally:
                    self._running.discard(limit)
        except TimeoutError:
            if self._by(began + self.seconds) == self._end:
                raise shutting_down() from None
            raise ApiError(504, f"no answer within {self.seconds:g} s", code="timeout") from None

    def drain(self, seconds: float) -> None:
        """From now on there are so many seconds for what runs."""
        self._end = asyncio.get_running_loop().time() + seconds
        for limit in self._running:
            if not limit.expired():
                limit.reschedule(self._by(limit.when()))

    def _by(self, time: float | None) -> float:
        return min(end for end in (time, self._end) if end is not None)


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "30"})

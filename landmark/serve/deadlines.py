"""How long requests may take: each its own time, and all of them until the server ends."""

from __future__ import annotations

import asyncio
from types import TracebackType

from .errors import ApiError


class Deadlines:
    """`seconds` for each request; after `drain` no more than those for all that are on their way."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end: float | None = None  # the event loop's time by which the server ends
        self.running: set[asyncio.Timeout] = set()

    @property
    def draining(self) -> bool:
        return self.end is not None

    def within(self) -> Deadline:
        """The work inside ends in time: as an ApiError, 504 where it was too slow, 503 where the server ends."""
        return Deadline(self)

    def drain(self, seconds: float) -> None:
        """From now on there are so many seconds for what runs."""
        self.end = asyncio.get_running_loop().time() + seconds
        for limit in self.running:
            when = limit.when()
            if when is not None and when > self.end and not limit.expired():
                limit.reschedule(self.end)


class Deadline:
    """One request's. No generator: it may be inside one, and the event loop closes those in any order."""

    def __init__(self, common: Deadlines) -> None:
        self._common = common

    async def __aenter__(self) -> None:
        own = asyncio.get_running_loop().time() + self._common.seconds
        self._limit = asyncio.timeout_at(own if self._common.end is None else min(own, self._common.end))
        self._common.running.add(self._limit)
        await self._limit.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._common.running.discard(self._limit)
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError:
            if self._limit.when() == self._common.end:
                raise shutting_down() from None
            late = f"no answer within {self._common.seconds:g} s"
            again = {"X-Should-Retry": "false"}  # the official client would ask twice more, for no other answer
            raise ApiError(504, late, code="timeout", headers=again) from None


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "30"})

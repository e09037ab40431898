"""How answers travel: in pieces as events, and no longer than somebody waits for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from ..infer.engine import Handle
from .errors import ApiError, failed

T = TypeVar("T")


class Gone(Exception):
    """The client has left."""


class Stream(StreamingResponse):
    """Pieces of an answer as events. However it ends, the requests that still run are cancelled; the generators are
    closed here, for who is cancelled while it sends leaves them to the event loop."""

    def __init__(self, pieces: AsyncGenerator[dict[str, Any]], handles: Sequence[Handle]) -> None:
        self.pieces, self.handles = pieces, handles
        self.lines = self._lines()
        super().__init__(self.lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _lines(self) -> AsyncGenerator[bytes]:
        try:
            async for piece in self.pieces:
                yield b"data: " + json.dumps(piece, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
        except Exception as error:
            told = error if isinstance(error, ApiError) else failed(error)
            yield b"event: error\ndata: " + json.dumps(told.body()).encode() + b"\n\n"
            return
        yield b"data: [DONE]\n\n"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.lines.aclose()
            await self.pieces.aclose()
            for handle in self.handles:
                if not handle.done:
                    handle.cancel()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result, or, where the client leaves first, an end to the work."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for pending in (task, leaving):
            pending.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)

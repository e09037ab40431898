"""What stands before the application: keys, the size and the speed of bodies, how many requests a minute."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
OPEN = ("/health", "/", "/page/", "/favicon.ico")  # what needs no key


@dataclass(frozen=True)
class Limits:
    """`keys`: any of them opens the server; none: it is open. `body`: bytes. `patience`: seconds that a client may take
    to send its body. `timeout`: seconds that a request may take in all. `drain`: those that it may still take when the
    server ends. `queue`: requests that may wait for the engine. `rate`: requests a minute for each key (or address)."""

    keys: Sequence[str] = ()
    body: int = 8 << 20
    patience: float = 30.0
    timeout: float = 600.0
    drain: float = 30.0
    queue: int = 256
    rate: int | None = None

    def __post_init__(self) -> None:
        if not all(key.strip() for key in self.keys):
            raise ValueError("an API key is empty, which would open the server to everyone; leave it out, or give one")
        for name in ("body", "patience", "timeout", "queue", "rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"the limit {name!r} is {value}; it must be positive")
        if not self.drain >= 0:
            raise ValueError(f"the limit 'drain' is {self.drain}; it must not be negative")


class Gate:
    """An ASGI application around another one."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self._allowance: dict[str, tuple[float, float]] = {}  # of each client: requests left, and when that was

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            key = self._check_key(scope["path"], headers)
            self._check_rate(key or (scope.get("client") or ("",))[0], scope["path"])
            body = await self._read(headers, receive) if scope["method"] in ("POST", "PUT", "PATCH") else b""
        except ApiError as error:
            await _refuse(error, send)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> str | None:
        if not self.limits.keys:
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        matches = [hmac.compare_digest(given, key.encode()) for key in self.limits.keys]
        if scheme.lower() == b"bearer" and any(matches):
            return given.decode("latin-1")
        if path in OPEN or path.startswith("/page/"):
            return None
        message = "the API key is wrong" if given else "no API key; send the header Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_rate(self, client: str, path: str) -> None:
        rate = self.limits.rate
        if rate is None or path in OPEN or path == "/stats" or path.startswith("/page/"):  # the page asks each second
            return
        now = time.monotonic()
        left, then = self._allowance.get(client, (float(rate), now))
        left = min(float(rate), left + (now - then) * rate / 60)
        if left < 1:
            wait = (1 - left) * 60 / rate
            raise ApiError(
                429, f"more than {rate} requests a minute", code="rate_limit_exceeded",
                headers={"Retry-After": str(max(1, round(wait)))},
            )  # fmt: skip
        if len(self._allowance) > 10_000:
            self._allowance.clear()
        self._allowance[client] = left - 1, now

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        most = self.limits.body
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise _too_large(int(length), most)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.limits.patience):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before it had sent its request")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise _too_large(size, most)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            late = f"the request's body took more than {self.limits.patience:g} s to arrive"
            raise ApiError(408, late, code="request_timeout") from None


def _too_large(size: int, most: int) -> ApiError:
    return ApiError(413, f"a body of {size:,} bytes; {most:,} at most", code="body_too_large")


async def _refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    headers |= error.headers
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})

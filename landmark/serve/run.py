"""The application on a socket, and how it ends.

SIGTERM or Ctrl-C: nobody new is let in, and what runs has `Limits.drain` seconds; what is not finished by then is told
so. Ctrl-C once more: the process ends at once.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

GRACE = 5.0  # seconds for the last words to those who are cut short


class HttpServer(uvicorn.Server):
    def __init__(self, app: FastAPI) -> None:
        self.app = app
        longest = math.ceil(app.state.server.limits.drain + GRACE)
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", timeout_graceful_shutdown=longest, timeout_keep_alive=30, lifespan="on",
                access_log=False,
            )
        )  # fmt: skip

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Raises KeyboardInterrupt after a Ctrl-C. It counts from when the application is started (asyncio would cancel
        that half way) until the end (another one would find the interpreter half taken down)."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        super().run(sockets)
        if signal.SIGINT in self._captured_signals:
            raise KeyboardInterrupt

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if running := len(self.server_state.tasks):
            seconds = f"{self.app.state.server.limits.drain:g} s"
            print(f"landmark: {seconds} for what runs ({running}) to finish; Ctrl-C ends it now", file=sys.stderr)
        self.app.state.server.drain()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            os._exit(130)  # an orderly end would wait for the engine's step, and for what reads large requests
        super().handle_exit(sig, frame)

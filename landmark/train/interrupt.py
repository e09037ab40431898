"""Ctrl-C while training: the first asks the loop to save and stop, a later one stops at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ECHO = 1.0  # seconds: a launcher passes on what the terminal has sent already


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the run was saved. `str` says where."""


@contextmanager
def catch_interrupts() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; outside of the main thread signals stay as they are."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not event.is_set():
            first = time.monotonic()
            event.set()
        elif number == signal.SIGINT and time.monotonic() - first > ECHO:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

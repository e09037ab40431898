"""Ctrl-C while training: the first asks the loop to save and stop, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the run was saved. `str` says where."""


@contextmanager
def catch_interrupts() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; outside of the main thread signals stay as they are."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()
        restore()

    for number in signals:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        restore()

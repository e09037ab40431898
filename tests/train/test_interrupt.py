"""Signals while training."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from landmark.train import interrupt


def test_the_first_asks_and_a_later_one_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interrupt.catch_interrupts() as event:
        assert not event.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert event.is_set()
        os.kill(os.getpid(), signal.SIGINT)  # an echo
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(interrupt, "ECHO", -1.0)
        os.kill(os.getpid(), signal.SIGTERM)  # the save goes on
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_in_another_thread_signals_stay_as_they_are() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with interrupt.catch_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]

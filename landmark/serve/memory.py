"""Memory that is free goes back to the system. The C library keeps what was ever taken at once, a few bodies of
megabytes side by side, for as long as something small lies above it; a server that runs for weeks only ever grows."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

EVERY = 20.0  # seconds; it takes some milliseconds of one thread


def trimmer() -> Callable[[], object] | None:
    """What gives free memory back, where the C library (glibc) has it."""
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
    return lambda: trim(ctypes.c_size_t(0))


async def keep_trim() -> None:
    """Do so for ever, beside the event loop."""
    trim = trimmer()
    while trim is not None:
        await asyncio.sleep(EVERY)
        await asyncio.to_thread(trim)

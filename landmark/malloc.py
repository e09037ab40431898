"""What the C library (glibc) does with memory that is free: keep it for the next buffer, or give it back.

Buffers beyond 32 MiB come fresh from the system, which clears each of their pages at its first touch, and go back to it
as soon as they are free; training on long texts spends half of its time so, and `kept` keeps them. A server does the
reverse: what a few large bodies side by side once took stays for as long as something small lies above it, and `trim`
gives it back; each of its threads would get a heap of its own, with gaps of its own, where `few_heaps` lets them share.
Elsewhere than on glibc these do nothing.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # of mallopt(3)
_NEVER, _LARGEST, _DEFAULT_MMAP_MAX = -1, 32 << 20, 65536
SHARE = 4  # unlike buffers leave gaps, of up to a third of the peak: they are kept where this many times it is there


def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except OSError:
        return None


LIBC = _libc()


def trim() -> None:
    """Give free memory back to the system; takes some milliseconds."""
    if LIBC is not None:
        LIBC.malloc_trim(ctypes.c_size_t(0))


def few_heaps(count: int = 2) -> None:
    """Let threads that begin to allocate from now on share so many heaps, the first one among them."""
    if LIBC is not None:
        LIBC.mallopt(_ARENA_MAX, count)


@contextmanager
def kept() -> Iterator[None]:
    """Within, memory that becomes free stays with the process; at the end it goes back, and later buffers do where the
    heap has no gap for them."""
    if LIBC is None:
        yield
        return
    LIBC.mallopt(_MMAP_MAX, 0)
    LIBC.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        LIBC.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        LIBC.mallopt(_MMAP_THRESHOLD, _LARGEST)  # where the library's own rule ends after one such buffer
        LIBC.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        trim()


def plenty(peak: int, processes: int = 1) -> bool:
    """Is the machine's memory `SHARE` times what this many processes of `peak` bytes each hold?"""
    return LIBC is not None and SHARE * peak * processes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

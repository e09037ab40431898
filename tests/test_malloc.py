"""What the C library keeps and gives back, seen in page faults and resident memory."""

import ctypes
import resource
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from landmark import malloc

pytestmark = pytest.mark.skipif(malloc.LIBC is None, reason="not glibc")
MIB = 2**20
LARGE = 1024 * MIB


def faults(size: int = 64 * MIB, times: int = 5) -> int:
    """Of this process in filling a new buffer of so many bytes so many times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.empty(size, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def kept() -> tuple[int, int, int, int, int]:
    """Faults before, within and after, and what is resident within and after."""
    before = faults()
    with malloc.kept():
        again = min(faults() for _ in range(12))  # aligned buffers do not fit at once where one was before
        held = resident()
    left = resident()
    return before, again, faults(LARGE, 2), held, left


def test_kept_memory_is_cleared_once_and_given_back() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        before, again, after, held, left = alone.submit(kept).result()
    pages = 64 * MIB // resource.getpagesize()
    assert before > 4 * pages
    assert again < pages / 10
    assert left < held - 48 * MIB
    assert after > 1.5 * LARGE // resource.getpagesize()  # no gap of the heap has room for it: it comes and goes again


def heaps(allowed: int | None) -> int:
    """From how many heaps eight threads at once get something small."""
    if allowed is not None:
        malloc.few_heaps(allowed)
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    together, found = threading.Barrier(8), set()

    def allocate() -> None:
        found.add(libc.malloc(1000) // (64 * MIB))  # where those of threads begin
        together.wait()

    threads = [threading.Thread(target=allocate) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(found)


def test_threads_share_few_heaps() -> None:
    for allowed, fits in ((2, range(1, 4)), (None, range(5, 9))):  # there may be a third one from before
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            assert alone.submit(heaps, allowed).result() in fits


def test_there_is_plenty_for_small_processes_only() -> None:
    assert malloc.plenty(MIB, 2)
    assert not malloc.plenty(2**50)

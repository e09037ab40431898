"""What the C library keeps and gives back, seen in page faults and resident memory."""

import resource
from pathlib import Path

import pytest
import torch

from landmark import malloc

pytestmark = pytest.mark.skipif(malloc.LIBC is None, reason="not glibc")
MIB = 2**20


def faults() -> int:
    """Of this process in filling a new buffer of 64 MiB five times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(64 * MIB, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_kept_memory_is_cleared_once_and_given_back() -> None:
    pages = 64 * MIB // resource.getpagesize()
    fresh = faults()
    with malloc.kept():
        again = min(faults() for _ in range(12))  # aligned buffers do not fit at once where one was before
        within = resident()
    assert fresh > 4 * pages
    assert again < pages / 10
    assert resident() < within - 48 * MIB
    assert faults() > 4 * pages  # as before


def test_there_is_plenty_for_small_processes_only() -> None:
    assert malloc.plenty(MIB, 2)
    assert not malloc.plenty(2**50)

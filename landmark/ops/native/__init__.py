"""Small C kernels, compiled at first use by the system's compiler and loaded with ctypes.

Each op keeps its C source beside its Python; a `Source` builds it into the per-user cache (XDG_CACHE_HOME or ~/.cache,
under landmark/), keyed by all that can change the result: sources, compiler, flags, processor. Without a compiler or a
writable cache ops run in plain torch, with a warning that says why; LANDMARK_NATIVE=0 asks for that.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

import torch  # first: its OpenMP runtime must be the one that the kernels find loaded
from torch.autograd import forward_ad

FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math",
    "-fno-strict-aliasing",  # numbers are read as what they were not written as
    "--param=avoid-fma-max-bits=0",  # gcc splits products and sums of some loops on Zen 2 to 4, and not of others
)  # fmt: skip
HEADERS = Path(__file__).parent
OFF = "LANDMARK_NATIVE=0"
TRANSFORMED = "torch.func and forward-mode derivatives do not see into it"


F = TypeVar("F", bound=Callable[..., object])


def constant(function: F) -> F:
    """torch.compiler.assume_constant_result, without its import of the compiler: seconds that most runs never need."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Unavailable(Exception):
    """Why no C kernels run here, in one line."""


def transformed() -> bool:
    """Whether a transform of torch.func or a level of forward-mode derivatives is at work: its tensors are more than
    the numbers that lie at their address."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class Source:
    """One C file, and its functions once built."""

    all: list[Source] = []

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library: ctypes.CDLL | None = None
        self._reason: str | None = None
        Source.all.append(self)

    @constant
    def why_not(self) -> str | None:
        """None if the kernels can be called, else why not. Builds them at the first call."""
        if transformed():
            return TRANSFORMED
        if self._library is None and self._reason is None:
            try:
                self._library = ctypes.CDLL(str(build(self.path)))
            except (Unavailable, OSError) as e:
                self._reason = str(e)
                told = {s._reason for s in Source.all if s is not self}
                if self._reason != OFF and self._reason not in told:
                    warnings.warn(f"{self._reason}; plain torch runs instead, which is slower", stacklevel=2)
        return self._reason

    @property
    def asked(self) -> bool:
        """Whether anybody wished to call it."""
        return self._library is not None or self._reason is not None

    def function(self, name: str, *argtypes: object) -> ctypes._NamedFuncPointer:
        """The C function `name` (returns void). Raises Unavailable if it cannot be built."""
        if (reason := self.why_not()) is not None:
            raise Unavailable(reason)
        f = getattr(self._library, name)
        f.argtypes, f.restype = argtypes, None
        return f

    def address(self, name: str) -> int:
        """Where a function or a constant is, for another kernel that is given it. Raises Unavailable as `function`."""
        if (reason := self.why_not()) is not None:
            raise Unavailable(reason)
        assert self._library is not None
        return ctypes.addressof(ctypes.c_char.in_dll(self._library, name))


def build(source: Path) -> Path:
    """The shared library of `source`, from the cache or compiled into it; Unavailable says why there is none."""
    if os.environ.get("LANDMARK_NATIVE", "1") == "0":
        raise Unavailable(OFF)
    cc = compiler()
    stat = os.stat(cc)
    headers = [header.read_bytes() for header in sorted(HEADERS.glob("*.h"))]
    parts = (source.read_bytes(), headers, cc, stat.st_size, stat.st_mtime_ns, FLAGS, processor())
    key = hashlib.sha256(repr(parts).encode())
    folder = cache_dir()
    library = folder / f"{source.stem}-{key.hexdigest()[:24]}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise Unavailable(f"the kernel cache {folder} belongs to another user: set XDG_CACHE_HOME")
        handle, name = tempfile.mkstemp(suffix=".so.tmp", dir=folder)
        os.close(handle)
    except OSError as e:
        raise Unavailable(f"cannot write the kernel cache {folder}: {e.strerror}; set XDG_CACHE_HOME") from e
    try:
        command = [cc, *FLAGS, f"-I{HEADERS}", str(source), "-o", name, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise Unavailable(f"{cc} failed on {source.name}: {first}")
        os.replace(name, library)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Unavailable(f"{cc} could not be run: {e}") from e
    finally:
        Path(name).unlink(missing_ok=True)
    return library


def compiler() -> str:
    """Path of the C compiler: $CC, else cc, gcc or clang on PATH."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for name in names:
        if (path := shutil.which(name)) is not None:
            return path
    raise Unavailable(f"no C compiler ({', '.join(names)}) on PATH: install gcc, or set CC")


def cache_dir() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "landmark"


def processor() -> str:
    """What -march=native depends on: the machine, its maker and its instruction sets."""
    try:
        with open("/proc/cpuinfo") as file:
            first = list(takewhile(str.strip, file))  # up to the blank line: all cores are alike
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    kept = ("vendor_id", "cpu family", "model name", "flags", "Features", "CPU implementer", "CPU part")
    return platform.machine() + "".join(line for line in first if line.partition(":")[0].strip() in kept)


def openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes loaded in this process: more than one means thread pools that fight."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    files = {line.split()[-1] for line in maps.read_text().splitlines() if ".so" in line}
    return sorted(f for f in files if Path(f).name.startswith(("libgomp", "libomp", "libiomp")))


def report() -> str:
    """One line: which C kernels have run, built by what, on how many threads; or why plain torch runs instead."""
    reasons = {s.path.stem: s.why_not() for s in Source.all if s.asked}
    built = [name for name, reason in reasons.items() if reason is None]
    missing = sorted({reason for reason in reasons.values() if reason is not None})
    if not built:
        return f"native kernels: none, plain torch runs instead ({'; '.join(missing) or 'no op asked for any'})"
    more = f"; not {', '.join(set(reasons) - set(built))} ({'; '.join(missing)})" if missing else ""
    runtimes = openmp_runtimes()
    pools = f", {len(runtimes)} OpenMP runtimes: {', '.join(runtimes)}" if len(runtimes) > 1 else ""
    return f"native kernels: {', '.join(built)} (C, {compiler()}, {torch.get_num_threads()} threads{pools}){more}"

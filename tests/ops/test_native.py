"""The build machinery: what is compiled runs, what cannot be compiled says why and falls back to plain torch."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

import landmark.ops
from landmark.ops import native

CODE = "void twice(double *x, long n) { for (long i = 0; i < n; i++) x[i] *= 2; }\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> native.Source:
    """A C file that no other test has built, with a cache of its own, not registered for other tests' reports."""
    monkeypatch.setattr(native.Source, "all", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LANDMARK_NATIVE", raising=False)
    (tmp_path / "twice.c").write_text(CODE)
    return native.Source(tmp_path / "twice.c")


def have_compiler() -> bool:
    try:
        native.compiler()
    except native.Unavailable:
        return False
    return True


needs_compiler = pytest.mark.skipif(not have_compiler(), reason="no C compiler here")


@needs_compiler
@pytest.mark.parametrize("path", sorted(Path(landmark.ops.__file__).parent.rglob("*.c")), ids=lambda path: path.stem)
def test_every_kernel_compiles(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that did not would be skipped by its own tests."""
    monkeypatch.setattr(native.Source, "all", [])
    assert native.Source(path).why_not() is None


@needs_compiler
def test_builds_and_runs(source: native.Source, tmp_path: Path) -> None:
    twice = source.function("twice", ctypes.c_void_p, ctypes.c_long)
    x = (ctypes.c_double * 3)(1, 2, 3)
    twice(ctypes.addressof(x), 3)
    assert list(x) == [2, 4, 6]
    assert native.report().startswith("native kernels: twice (C, ")
    assert [p.suffix for p in (tmp_path / "cache" / "landmark").iterdir()] == [".so"]  # no temporary file is left


@needs_compiler
def test_cache_is_used_and_keyed_by_the_source(source: native.Source) -> None:
    first = native.build(source.path)
    made = first.stat().st_mtime_ns
    assert native.build(source.path) == first and first.stat().st_mtime_ns == made
    source.path.write_text(CODE.replace("2", "3"))
    assert native.build(source.path) != first


@needs_compiler
def test_concurrent_builds(source: native.Source, tmp_path: Path) -> None:
    program = (
        "import sys, ctypes; from pathlib import Path; from landmark.ops import native\n"
        "ctypes.CDLL(str(native.build(Path(sys.argv[1])))).twice"
    )
    command = [sys.executable, "-c", program, str(source.path)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(run.communicate()[1], run.returncode) for run in runs] == [("", 0)] * 2
    assert len(list((tmp_path / "cache" / "landmark").iterdir())) == 1


def test_turned_off(source: native.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANDMARK_NATIVE", "0")
    assert source.why_not() == "LANDMARK_NATIVE=0"
    assert native.report() == "native kernels: none, plain torch runs instead (LANDMARK_NATIVE=0)"


def test_no_compiler(source: native.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.warns(UserWarning, match=r"no-such-compiler.*; plain torch runs instead") as warned:
        assert source.why_not() == "no C compiler (no-such-compiler) on PATH: install gcc, or set CC"
        assert native.Source(source.path).why_not() is not None
    assert len(warned) == 1  # a reason is told once
    with pytest.raises(native.Unavailable, match="no-such-compiler"):
        source.function("twice")


@needs_compiler
def test_source_that_does_not_compile(source: native.Source, tmp_path: Path) -> None:
    source.path.write_text("void twice(")
    with pytest.warns(UserWarning, match="failed on twice.c"):
        reason = source.why_not()
    assert reason is not None and "failed on twice.c" in reason and "\n" not in reason
    assert list((tmp_path / "cache" / "landmark").iterdir()) == []


def test_compiler_that_is_no_program(source: native.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cc").write_bytes(b"\x7fnot a program")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    with pytest.warns(UserWarning, match="could not be run"):
        reason = source.why_not()
    assert reason is not None and "could not be run" in reason


@needs_compiler
def test_cache_that_cannot_be_written(source: native.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot write the kernel cache"):
        reason = source.why_not()
    assert reason is not None and reason.startswith("cannot write the kernel cache")


@needs_compiler
def test_damaged_library(source: native.Source) -> None:
    native.build(source.path).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="plain torch runs instead"):
        assert source.why_not() is not None


@needs_compiler
def test_one_openmp_runtime() -> None:
    program = (
        "import torch; torch.ones(1 << 20).sum()\n"
        "from landmark.ops import fused, native\n"
        "fused.rms_norm(torch.ones(64, 1024), None, 1e-6, backend='cpu')\n"
        "print(len(native.openmp_runtimes()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1


def test_ops_without_kernels_give_the_same() -> None:
    program = (
        "import torch; from landmark.ops import fused, linear, loss, native\n"
        "torch.manual_seed(0); x, w = torch.randn(4, 64), torch.randn(96, 64)\n"
        "with torch.no_grad(): y = linear.linear(x, w)\n"
        "l = loss.cross_entropy(y, torch.randn(50, 96), torch.arange(4)).loss\n"
        "print(native.Source.all[0].why_not() is None, float(fused.rms_norm(y, None, 1e-6).sum()), float(l))"
    )
    environment = {**os.environ, "LANDMARK_NATIVE": "0"}
    lines = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=e
        ).stdout.split()
        for e in ({**environment, "LANDMARK_NATIVE": "1"}, environment)
    ]
    assert lines[1][0] == "False"
    assert [float(v) for v in lines[0][1:]] == pytest.approx([float(v) for v in lines[1][1:]], rel=1e-4)

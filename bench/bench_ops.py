"""The ops beside torch's own: few rows, training products, the loss, and a block's elementwise work.

    python bench/bench_ops.py [linear] [training] [loss] [fused] [--rounds 9] [--json]

Ours and torch's run in turn, and a row is timed only after both gave the same result. Both sides have large pages:
without them, faults on fresh memory are most of what torch's larger losses cost.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import torch.nn.functional as F
from pair import interleave, show
from torch import Tensor

from landmark.ops import fused
from landmark.ops.linear import linear
from landmark.ops.loss import cross_entropy

Step = Callable[[], Any]
Row = dict[str, Any]


def compare(op: str, dtype: torch.dtype, shape: str, ours: Step, theirs: Step, rounds: int, **more: Any) -> Row:
    """A row of the table, once both sides agree."""
    a, b = ours(), theirs()
    a, b = (x[-1] if isinstance(x, list | tuple) else x for x in (a, b))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    assert (a - b).abs().max() <= tolerance * b.abs().max(), f"{op} {shape}: the results differ"
    times = interleave(ours, theirs, rounds)
    row = {"op": op, "dtype": str(dtype)[6:], "shape": shape, "ours_ms": times["ours_s"] * 1e3,
           "torch_ms": times["theirs_s"] * 1e3, "speedup": times["speedup"]}  # fmt: skip
    return row | more


def few_rows(rounds: int) -> Iterator[Row]:
    """Decoding: products of 1 to 8 rows with more weights than fit a cache, beside the speed of reading them."""
    for dtype in (torch.bfloat16, torch.float32):
        for out, width in ((2304, 768), (8192, 2048), (2048, 8192), (50257, 768)):
            count = max(1, 2**28 // (out * width * dtype.itemsize))
            weights = torch.randn(count, out, width).to(dtype).unbind()
            read = torch.ones(count * out * width * dtype.itemsize // 4)
            for rows in (1, 4, 8):
                x = torch.randn(rows, width).to(dtype)
                with torch.inference_mode():
                    ours = lambda x=x, ws=weights: [linear(x, w) for w in ws]
                    theirs = lambda x=x, ws=weights: [F.linear(x, w) for w in ws]
                    bandwidth = interleave(ours, read.sum, rounds)["speedup"]
                    yield compare("linear", dtype, f"{rows} x {width} -> {out}, {count} times", ours, theirs, rounds,
                                  bandwidth=bandwidth)  # fmt: skip


def training(rounds: int) -> Iterator[Row]:
    """Products of training in float32, forward and backward."""
    for rows, width, out in ((2048, 384, 1024), (2048, 768, 3072)):
        x, w = (torch.randn(s, requires_grad=True) for s in ((rows, width), (out, width)))
        g = torch.randn(rows, out)
        step = lambda f, x=x, w=w, g=g: torch.autograd.grad(f(x, w), (x, w), g)
        yield compare("linear + backward", x.dtype, f"{rows} x {width} -> {out}", lambda s=step: s(linear),
                      lambda s=step: s(F.linear), rounds)  # fmt: skip


def loss(rounds: int) -> Iterator[Row]:
    """Linear head and cross-entropy with gradients; torch's logits in float32, as transformers computes them."""
    for dtype in (torch.bfloat16, torch.float32):
        for vocab in (32000, 128256):
            h = torch.randn(2048, 512).to(dtype).requires_grad_()
            w = torch.randn(vocab, 512).mul_(0.02).to(dtype).requires_grad_()
            targets = torch.randint(0, vocab, (2048,))

            def ours(h: Tensor = h, w: Tensor = w, targets: Tensor = targets) -> tuple[Tensor, ...]:
                out = cross_entropy(h, w, targets)
                return torch.autograd.grad(out.loss / out.count, (h, w))

            def theirs(h: Tensor = h, w: Tensor = w, targets: Tensor = targets) -> tuple[Tensor, ...]:
                return torch.autograd.grad(F.cross_entropy(F.linear(h, w).float(), targets), (h, w))

            a, b = peak_mib(ours), peak_mib(theirs)
            yield compare("head + cross-entropy", dtype, f"2048 x 512 -> {vocab}", ours, theirs, rounds, ours_mib=a,
                          torch_mib=b, memory=a / b)  # fmt: skip


def elementwise(rounds: int) -> Iterator[Row]:
    """A block's work outside of products, forward and backward; torch's side is the plain equation in float32."""
    angles = torch.randn(1, 512, 32)
    gelu = lambda x, backend: fused.activate(x, "gelu_tanh") if backend == "cpu" else F.gelu(x, approximate="tanh")
    ops: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
        "rms_norm": (lambda x, w, backend: fused.rms_norm(x, w, 1e-6, backend=backend), [(4, 512, 384), (384,)]),
        "glu silu": (lambda g, u, backend: fused.glu(g, u, "silu", backend=backend), [(4, 512, 1024)] * 2),
        "gelu": (gelu, [(4, 512, 3072)]),
        "rotary": (lambda x, backend: fused.rotary(x, angles.cos(), angles.sin(), backend=backend), [(4, 512, 6, 64)]),
    }
    for dtype in (torch.bfloat16, torch.float32):
        for op, (f, shapes) in ops.items():
            tensors = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
            g = torch.randn(shapes[0]).to(dtype)
            step = lambda backend, f=f, t=tensors, g=g: torch.autograd.grad(f(*t, backend=backend), t, g)
            yield compare(f"{op} + backward", dtype, " x ".join(map(str, shapes[0])), lambda s=step: s("cpu"),
                          lambda s=step: s("reference"), rounds)  # fmt: skip


def peak_mib(run: Step) -> float:
    """MiB that `run` holds at its peak above what the process held before, by Linux's own count."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


SECTIONS = {"linear": few_rows, "training": training, "loss": loss, "fused": elementwise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="|".join(SECTIONS), help="all by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    for section in args.sections or SECTIONS:
        show(list(SECTIONS[section](args.rounds)), args.json)


if __name__ == "__main__":
    main()

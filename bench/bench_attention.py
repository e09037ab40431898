"""Our attention kernels beside torch's: training shapes forward and backward, and one new token over a cache.

    OMP_NUM_THREADS=1 python bench/bench_attention.py [--rounds 9] [--json]

GFLOP/s count the pairs that a causal mask leaves, 4 d operations each forward and 10 d backward; `matmul` is torch's
product of two 1024 x 1024 matrices on the same threads. GB/s count keys and values once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from pair import interleave, seconds, show
from torch import Tensor

from landmark.ctx import Bounds
from landmark.ops.attention import attention

TRAINING = [(4, 512, 6, 64), (4, 1024, 12, 64)]  # rows, tokens, heads, width of a head
DECODING = [(1, 128), (1, 1024), (1, 4096), (8, 128), (8, 1024), (8, 4096)]  # sequences and their tokens
HEADS, KV_HEADS, WIDTH = 32, 8, 64
DTYPES = (torch.bfloat16, torch.float32)


def training(rows: int, tokens: int, heads: int, d: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    bounds = Bounds(rows, tokens)
    q, k, v, grad = (torch.randn(rows, tokens, heads, d).to(dtype) for _ in range(4))
    for t in (q, k, v):
        t.requires_grad_()

    def forward(backend: str) -> Tensor:
        return attention(q, k, v, bounds=bounds, scale=d**-0.5, causal=True, backend=backend)

    def backward(y: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(y, (q, k, v), grad, retain_graph=True)

    square = torch.randn(1024, 1024).to(dtype)
    matmul = 2 * 1024**3 / min(seconds(lambda: square @ square) for _ in range(20))
    work = 4 * rows * heads * d * tokens * (tokens + 1) / 2
    out = []
    for name, flops, ours, theirs in (
        ("forward", work, lambda: forward("cpu"), lambda: forward("sdpa")),
        ("backward", 2.5 * work, backward(forward("cpu")), backward(forward("sdpa"))),
    ):
        times = interleave(ours, theirs, rounds)
        row = {"what": f"{name} {rows} x {tokens}, {heads} heads of {d}", "dtype": str(dtype)[6:]}
        rate = flops / times["ours_s"]
        out.append(row | milliseconds(times) | {"GFLOP/s": rate / 1e9, "of matmul": rate / matmul})
    return out


@torch.inference_mode()
def decoding(slots: int, tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    k, v = (torch.randn(slots, KV_HEADS, tokens + 64, WIDTH).to(dtype)[:, :, :tokens].transpose(1, 2) for _ in range(2))
    q = torch.randn(slots, 1, HEADS, WIDTH).to(dtype)
    bounds, k_bounds = Bounds(slots, 1), Bounds(slots, tokens)
    calls = max(4, 200_000 // (slots * tokens))

    def run(backend: str) -> Callable[[], None]:
        def many() -> None:
            for _ in range(calls):
                attention(
                    q, k, v, bounds=bounds, k_bounds=k_bounds, scale=WIDTH**-0.5, causal=True, backend=backend
                )  # fmt: skip

        return many

    times = interleave(run("decode"), run("sdpa"), rounds)
    times = {name: t / calls if name.endswith("_s") else t for name, t in times.items()}
    what = f"decode {slots} x {tokens}, {HEADS} heads over {KV_HEADS} of {WIDTH}"
    rate = 2 * slots * tokens * KV_HEADS * WIDTH * k.element_size() / times["ours_s"]
    return {"what": what, "dtype": str(dtype)[6:]} | milliseconds(times) | {"GB/s": rate / 1e9}


def milliseconds(times: dict[str, float]) -> dict[str, float]:
    """Seconds of each as milliseconds, and the speedup."""
    return {
        "ours_ms": times["ours_s"] * 1e3,
        "torch_ms": times["theirs_s"] * 1e3,
        "speedup": times["speedup"],
        "speedup_min": times["speedup_min"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    show([r for shape in TRAINING for t in DTYPES for r in training(*shape, t, args.rounds)], args.json)
    show([decoding(*shape, t, args.rounds) for t in DTYPES for shape in DECODING], args.json)


if __name__ == "__main__":
    main()

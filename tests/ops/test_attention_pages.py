"""Keys and values in blocks, wherever they are: the same attention, and nothing else in the pool is looked at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from landmark.ctx import Bounds
from landmark.ops.attention import attention, decode, reference
from landmark.ops.attention.pages import Pages

HEADS, KV_HEADS, D, DV = 6, 2, 32, 48
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
CALLS = {  # name: (queries of each sequence, keys of each)
    "one token each": ((1, 1, 1, 1), (1, 70, 33, 8)),
    "tokens and a chunk": ((1, 1, 17), (40, 9, 50)),
    "tokens and chunks": ((1, 1, 1, 12, 63, 1), (2, 300, 8, 12, 90, 5)),
    "one chunk": ((16,), (61,)),
    "chunks": ((5, 1, 8), (5, 20, 64)),
}
MASKS = {"full": (None, None), "window": (13, None), "soft cap": (None, 5.0)}


def paged(tensors: list[Tensor], size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences [tokens, heads, d] laid into scattered blocks of a pool full of NaN, and their tables."""
    needed = [-(-len(x) // size) for x in tensors]
    numbers = torch.randperm(sum(needed) + 5, generator=torch.Generator().manual_seed(seed))
    pool = torch.full((len(numbers), tensors[0].shape[1], size, tensors[0].shape[2]), torch.nan, dtype=tensors[0].dtype)
    tables = torch.full((len(tensors), max(needed) + 1), 10**9)
    at = 0
    for i, (x, n) in enumerate(zip(tensors, needed, strict=True)):
        tables[i, :n] = numbers[at : at + n]
        for j in range(n):
            part = x[j * size : (j + 1) * size]
            pool[numbers[at + j], :, : len(part)] = part.transpose(0, 1)
        at += n
    return pool, tables


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_equations(dtype: torch.dtype, size: int, call: str, mask: str) -> None:
    (new, seen), (window, softcap) = CALLS[call], MASKS[mask]
    g = torch.Generator().manual_seed(1)
    ks = [torch.randn(n, KV_HEADS, D, generator=g).to(dtype) for n in seen]
    vs = [torch.randn(n, KV_HEADS, DV, generator=g).to(dtype) for n in seen]
    (k, tables), (v, _) = paged(ks, size), paged(vs, size)
    dense = max(new) == 1
    bounds = Bounds(len(new), 1) if dense else Bounds.of_lengths(new)
    q = torch.randn(bounds.rows, bounds.width, HEADS, D, generator=g).to(dtype)
    want = reference(
        q.double(), torch.cat(ks)[None].double(), torch.cat(vs)[None].double(), bounds=bounds,
        k_bounds=Bounds.of_lengths(seen), scale=0.2, causal=True, window=window, softcap=softcap,
    )  # fmt: skip
    fallback = "plain" if softcap else "sdpa"
    backends = [None, fallback, *(["decode"] if dense and dtype != torch.float64 else [])]
    for backend in backends:
        if backend == "decode" and decode.SOURCE.why_not() is not None:
            continue
        y = attention(
            q, k, v, bounds=bounds, k_bounds=Pages.of(tables, seen, size), scale=0.2, causal=True, window=window,
            softcap=softcap, backend=backend,
        )  # fmt: skip
        error = (y.double() - want).abs().max().item()
        assert error < TOLERANCE[dtype] * max(1.0, want.abs().max().item()), backend


def test_two_pools_in_one_call() -> None:
    """Groups of layers share the bounds of a call, not their pages."""
    g = torch.Generator().manual_seed(1)
    new, q = (1, 1, 9), torch.randn(1, 11, HEADS, D, generator=g)
    bounds = Bounds.of_lengths(new)
    for key, seen in enumerate(((20, 30, 40), (5, 8, 20))):
        ks = [torch.randn(n, KV_HEADS, D, generator=g) for n in seen]
        pool, tables = paged(ks, 8, key)
        pages, masks = Pages.of(tables, seen, 8, key), {"scale": 0.2, "causal": True}
        y = attention(q, pool, pool, bounds=bounds, k_bounds=pages, **masks)
        keys = torch.cat(ks)[None]
        want = reference(q, keys, keys, bounds=bounds, k_bounds=Bounds.of_lengths(seen), **masks)
        assert (y - want).abs().max() < 1e-5


def test_what_pages_do_not_have() -> None:
    pool = torch.zeros(3, KV_HEADS, 8, D)
    pages = Pages.of(torch.tensor([[0]]), (4,), 8)
    with pytest.raises(ValueError, match="no bias"):
        q, bias = torch.zeros(1, 1, HEADS, D), torch.zeros(1, HEADS, 1, 4)
        attention(q, pool, pool, bounds=Bounds(1, 1), k_bounds=pages, scale=1.0, causal=True, bias=bias)

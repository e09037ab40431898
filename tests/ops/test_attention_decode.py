"""The kernel for one new token a sequence, against the equations in float64; keys outside of a sequence are NaN."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from landmark.ctx import Bounds
from landmark.ops.attention import attention, decode, reference

needs_kernel = pytest.mark.skipif(decode.SOURCE.why_not() is not None, reason="no C compiler")


def cache(lengths: tuple[int, ...], kv_heads: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Bounds]:
    """[slots, tokens, kv_heads, d] as a view of a larger buffer [slots, kv_heads, capacity, d]."""
    width = max(lengths)
    buffer = torch.randn(len(lengths), kv_heads, width + 5, d, generator=torch.Generator().manual_seed(d)).to(dtype)
    for slot, length in enumerate(lengths):
        buffer[slot, :, length:] = math.nan
    return buffer[:, :, :width].transpose(1, 2), Bounds.padded(lengths, width)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 1), (14, 2), (8, 4)])
@pytest.mark.parametrize(("d", "dv"), [(16, 16), (64, 128), (80, 48)])
@torch.inference_mode()
def test_equals_the_equations(dtype: torch.dtype, heads: int, kv_heads: int, d: int, dv: int) -> None:
    for lengths in ((1,), (300, 300), (17, 1, 128, 129, 16), (1024, 2500)):
        q = torch.randn(len(lengths), 1, heads, d, generator=torch.Generator().manual_seed(0)).to(dtype)
        k, k_bounds = cache(lengths, kv_heads, d, dtype)
        v, _ = cache(lengths, kv_heads, dv, dtype)
        bounds = Bounds(len(lengths), 1)
        for window, softcap in itertools.product((None, 1, 20), (None, 2.0)):
            options = {"scale": 0.3, "causal": True, "window": window, "softcap": softcap}
            y = attention(q, k, v, bounds=bounds, k_bounds=k_bounds, backend="decode", **options)
            want = reference(q.double(), k.double(), v.double(), bounds=bounds, k_bounds=k_bounds, **options)
            tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
            assert y.dtype == dtype and y.shape == want.shape
            assert (y - want).abs().max() <= tolerance * want.abs().max()


@needs_kernel
@torch.inference_mode()
def test_threads_and_order_change_nothing() -> None:
    """A slot's result is the same to the bit whatever the others are."""
    lengths = (2300, 41, 512)
    q = torch.randn(3, 1, 8, 64)
    k, k_bounds = cache(lengths, 2, 64, torch.float32)
    options = {"bounds": Bounds(3, 1), "scale": 0.125, "causal": True, "backend": "decode"}
    together = attention(q, k, k, k_bounds=k_bounds, **options)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(attention(q, k, k, k_bounds=k_bounds, **options), together)
    finally:
        torch.set_num_threads(before)
    options["bounds"] = Bounds(1, 1)
    for slot, length in enumerate(lengths):
        one = k[slot : slot + 1, :length]
        assert torch.equal(
            attention(q[slot : slot + 1], one, one, k_bounds=Bounds(1, length), **options)[0], together[slot]
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": torch.zeros(1, 2, 2, 16), "bounds": Bounds(1, 2)}, "one query a sequence"),
        ({"dropout": 0.1}, "without bias and dropout"),
        ({"q": torch.zeros(1, 1, 2, 16, dtype=torch.float64)}, "float32 and bfloat16"),
        ({"q": torch.zeros(1, 1, 2, 24), "k": torch.zeros(1, 9, 2, 24)}, "a multiple of 16"),
        ({"q": torch.zeros(1, 1, 2, 16, requires_grad=True)}, "no gradient"),
        ({"k_bounds": Bounds(1, 9, ((0, 4), (4, 5)))}, "in the same row"),
    ],
)
def test_forcing_it_where_it_cannot(change: dict, reason: str) -> None:
    k = torch.zeros(1, 9, 2, 16)
    call = {"q": torch.zeros(1, 1, 2, 16), "k": k, "v": k, "bounds": Bounds(1, 1), "k_bounds": Bounds(1, 9)} | change
    with pytest.raises(ValueError, match=f"'decode' cannot serve this call: .*{reason}"):
        attention(**call, scale=1.0, causal=True, backend="decode")

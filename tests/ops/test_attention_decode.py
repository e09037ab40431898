"""The kernel for one new token a sequence, against the equations in float64; keys outside of a sequence are NaN."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from landmark.ctx import Bounds
from landmark.ops.attention import attention, decode, reference
from landmark.ops.attention.pages import Pages
from landmark.ops.fused import rotary

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


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("turned", "interleaved"), [(0, False), (32, False), (24, True), (16, False)])
@pytest.mark.parametrize("paged", [False, True])
@torch.inference_mode()
def test_the_last_key_turns_and_is_kept_on_the_way(
    dtype: torch.dtype, turned: int, interleaved: bool, paged: bool
) -> None:
    lengths, heads, kv_heads, d, dv = (5, 40, 1, 33), 6, 2, 32, 48
    q, k, v = (torch.randn(4, 1, h, n).to(dtype) for h, n in ((heads, d), (kv_heads, d), (kv_heads, dv)))
    angles = torch.rand(4, 1, turned // 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    held: tuple[Tensor, Tensor]
    seen: Bounds
    if paged:
        held = torch.randn(24, kv_heads, 8, d).to(dtype), torch.randn(24, kv_heads, 8, dv).to(dtype)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
        seen = Pages.of(order.view(4, 6), lengths, 8)
    else:
        (held_k, seen), (held_v, _) = (cache(lengths, kv_heads, n, dtype) for n in (d, dv))
        held = held_k, held_v
    kept = tuple(x.clone() for x in held)
    wide = (cos.float(), sin.float()) if turned else (None, None)
    fresh = decode.Fresh(k, v, *wide, interleaved)
    options = {"scale": 0.3, "window": 20, "softcap": None}
    got = decode.decode(q, *held, seen, fresh=fresh, **options)
    if turned:
        q, k = rotary(q, cos, sin, interleaved=interleaved), rotary(k, cos, sin, interleaved=interleaved)
    for x, new in zip(kept, (k, v), strict=True):
        for slot, length in enumerate(lengths):
            if isinstance(seen, Pages):
                x[seen.tables[slot, (length - 1) // 8], :, (length - 1) % 8] = new[slot, 0]
            else:
                x[slot, length - 1] = new[slot, 0]
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(got, decode.decode(q, *kept, seen, **options), **close)
    for ours, theirs in zip(held, kept, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, **close)


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

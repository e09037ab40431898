"""Chunked attention: who sees whom, in every way of cutting a text into calls, and back again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from landmark.ctx import Bounds, Ctx
from landmark.models.base import Init, init_weights
from landmark.nn.attention import Attention, LogTemperature
from landmark.nn.chunked import ChunkCache, pieces
from landmark.nn.rope import Rope

DIM, SIZE = 32, 5


def made(chunk: int | None = SIZE, **keys: object) -> Attention:
    config = Attention.Config(heads=4, kv_heads=2, head_dim=16, rope=Rope.Config(), chunk=chunk, **keys)
    torch.manual_seed(0)
    attn = config.build(DIM)
    init_weights(attn, Init(std=0.3))
    return attn.eval()


def context(bounds: Bounds, past: tuple[int, ...] | None = None) -> Ctx:
    before = torch.tensor(past or (0,) * len(bounds.sequences))
    return Ctx(bounds.offsets() + bounds.per_token(before), bounds, past)


def masked(attn: Attention, x: Tensor) -> Tensor:
    """One sequence [1, T, dim], through a dense mask: j <= i and i // size == j // size."""
    t = x.shape[1]
    ctx = context(Bounds(1, t))
    q, k, v = (m(x).view(1, t, -1, 16) for m in (attn.q, attn.k, attn.v))
    assert attn.rope is not None
    q, k = attn.rope(q, ctx), attn.rope(k, ctx)
    k, v = (y.repeat_interleave(2, 2) for y in (k, v))
    at = torch.arange(t)
    sees = (at[:, None] >= at) & (at[:, None] // SIZE == at // SIZE)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    return attn.out(torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v).flatten(-2))


@pytest.mark.parametrize("length", [1, 4, 5, 6, 10, 23])
def test_a_query_sees_its_own_chunk(length: int) -> None:
    attn, x = made(), torch.randn(2, length, DIM)
    y = attn(x, context(Bounds(2, length)))
    torch.testing.assert_close(y, torch.cat([masked(attn, row[None]) for row in x]), rtol=1e-4, atol=1e-5)


def test_packed_documents_have_chunks_of_their_own() -> None:
    attn, x = made(), torch.randn(1, 24, DIM)
    lengths = (7, 1, 12, 4)
    y, at = attn(x, context(Bounds.of_lengths(lengths))), 0
    for n in lengths:
        torch.testing.assert_close(y[:, at : at + n], masked(attn, x[:, at : at + n]), rtol=1e-4, atol=1e-5)
        at += n


def test_gradients_stay_within_a_chunk() -> None:
    attn, x = made(), torch.randn(1, 12, DIM, requires_grad=True)
    (grad,) = torch.autograd.grad(attn(x, context(Bounds(1, 12)))[0, 8].sum(), x)
    assert grad[0].any(-1).nonzero().flatten().tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("steps", [(1,) * 23, (5, 5, 5, 5, 3), (3, 1, 9, 1, 1, 6, 2), (23,), (22, 1), (4, 12, 1, 6)])
def test_decoding_in_any_steps(steps: tuple[int, ...]) -> None:
    """With drafts of a chunk and more that are taken back."""
    attn, x = made(), torch.randn(2, 23, DIM)
    whole = attn(x, context(Bounds(2, 23)))
    state = attn.new_state(2, 23, torch.float32, torch.device("cpu"))
    assert isinstance(state, ChunkCache)
    with torch.no_grad():
        outs, at = [], 0
        for n in steps:
            snapshot = state.snapshot()
            attn(torch.randn(2, 7, DIM), context(Bounds(2, 7), (at, at)), state)  # a draft, taken back
            state.restore(snapshot)
            y = attn(x[:, at : at + n], context(Bounds(2, n), (at, at)), state)
            outs.append(y)
            at += n
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-4, atol=1e-5)


def test_slots_at_different_places_of_their_chunks() -> None:
    attn, texts = made(), [torch.randn(1, n, DIM) for n in (13, 21, 9)]
    state = attn.new_state(3, 40, torch.float32, torch.device("cpu"))
    past = (0, 0, 0)
    found: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for lengths in ((7, 10, 4), (1, 1, 1), (5, 10, 4)):
            parts = [text[:, p : p + n] for text, p, n in zip(texts, past, lengths, strict=True)]
            flat = torch.cat(parts, 1) if lengths != (1, 1, 1) else torch.cat(parts)
            bounds = Bounds.of_lengths(lengths) if lengths != (1, 1, 1) else Bounds(3, 1)
            y = attn(flat, context(bounds, past), state).flatten(0, 1)
            for slot, out in enumerate(y.split(lengths)):
                found[slot].append(out)
            past = tuple(p + n for p, n in zip(past, lengths, strict=True))
        for text, outs in zip(texts, found, strict=True):
            torch.testing.assert_close(torch.cat(outs)[None], masked(attn, text), rtol=1e-4, atol=1e-5)
        state.select(torch.tensor([2, 0]))
        again = attn(torch.ones(2, 1, DIM), context(Bounds(2, 1), (9, 13)), state)
        for i, text in enumerate((texts[2], texts[0])):
            want = masked(attn, torch.cat([text, torch.ones(1, 1, DIM)], 1))[:, -1]
            torch.testing.assert_close(again[i], want, rtol=1e-4, atol=1e-5)


def test_pieces() -> None:
    assert pieces(0, 12, 5) == [5, 5, 2] and pieces(3, 12, 5) == [2, 5, 5] and pieces(4, 1, 5) == [1]
    assert pieces(2, 2, 5) == [2]


def test_temperature_grows_with_the_position() -> None:
    factors = LogTemperature(floor=4, scale=0.5).factors(context(Bounds(1, 9)), torch.float64).flatten()
    want = [1 + 0.5 * torch.tensor(float((p + 1) // 4)).log1p().item() for p in range(9)]
    assert factors.tolist() == pytest.approx(want)


@pytest.mark.parametrize("keys", [{"window": 4}, {"causal": False}])
def test_bad_configs(keys: dict) -> None:
    with pytest.raises(ValueError, match="chunk is 5"):
        made(**keys)

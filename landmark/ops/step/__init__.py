"""A residual sublayer of a few tokens in one call of a C kernel (step.c): x + scale f(norm(x)), where f is attention
over a cache or a feed-forward function.

What Python spends between the kernels of a layer is more than a small model's layer takes, and a quarter of what a
large one's does whose weights have four bits. The same kernels run, in the same order, in one team of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_char_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ctx import Bounds
from ..activation import ACTIVATIONS
from ..attention import decode
from ..native import Source

SOURCE = Source(Path(__file__).with_name("step.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
KINDS = {name: kind for kind, name in enumerate(ACTIVATIONS)}  # as act.h's enum
MAX_TOKENS = 16
ONE_THREAD = 2**17  # bytes of weights that a second thread would not read any sooner
_pack = Struct(f"3P2P3q{'4P2q' * 4}P4q{decode.LAYOUT}3f").pack  # step.c's Step
_NO_MAP = (0, 0, 0, 0, 0, 0)
_NO_ATTENTION = (0,) * (len(Struct(decode.LAYOUT).unpack(bytes(Struct(decode.LAYOUT).size))) - 4) + (0.0,) * 4


class Map(NamedTuple):
    """y = x W^T + b, wherever its numbers lie."""

    kind: int  # the address of a Kind of maps.h
    fields: tuple[int, ...]  # of maps.h's Map
    width: int
    bytes: int


class Norm(NamedTuple):
    """RMSNorm by a weight of x's type."""

    weight: Tensor
    eps: float
    offset: float


def why_not(x: Tensor) -> str | None:
    """None if the kernel can run on x [B, T, dim], else why not."""
    if not x.is_cpu or x.dtype not in SUFFIX:
        return "it takes float32 and bfloat16 on cpu"
    if not 0 < (tokens := x.shape[0] * x.shape[1]) <= MAX_TOKENS:
        return f"it takes 1 to {MAX_TOKENS} tokens, not {tokens}"
    if torch.is_grad_enabled():
        return "it has no gradient"
    if torch.compiler.is_compiling():
        return "compilers do not see through it"
    if torch.is_autocast_enabled("cpu"):
        return "autocast picks the dtype"
    return SOURCE.why_not() or decode.SOURCE.why_not()


class Call(NamedTuple):
    """What of a call stays the same from token to token, in the order of step.c's Step."""

    weights: tuple[int, ...]  # norm, kinds, widths, maps
    answer: int
    act: int
    bytes: int
    norm: tuple[float, float]  # eps, offset
    heads: tuple[int, int, float, float] | None = None  # addresses of norms of queries and keys, eps, offset


def feed_forward_call(norm: Norm, first: Sequence[Map], down: Map, act: str) -> Call:
    """Of down(act(gate(norm(x))) up(norm(x))), or with one map of down(act(up(norm(x))))."""
    return _prepared(norm, first, down)._replace(act=KINDS[act])


def attend_call(
    norm: Norm, qkv: Sequence[Map], out: Map, head_norms: tuple[Norm, Norm] | None, dtype: torch.dtype
) -> Call:
    """Of out(attention of norm(x)); `head_norms` are of queries and keys, `dtype` is x's."""
    found = _prepared(norm, qkv, out)._replace(answer=_answer(dtype))
    if head_norms is None:
        return found
    q, k = head_norms
    return found._replace(heads=(q.weight.data_ptr(), k.weight.data_ptr(), q.eps, q.offset))


def _prepared(norm: Norm, first: Sequence[Map], last: Map) -> Call:
    fields = (*(m.fields for m in first), _NO_MAP, _NO_MAP)[:3]
    weights = (
        norm.weight.data_ptr(), first[0].kind, last.kind, len(first), first[0].width, last.width,
        *fields[0], *fields[1], *fields[2], *last.fields,
    )  # fmt: skip
    return Call(weights, 0, 0, last.bytes + sum(m.bytes for m in first), (norm.eps, norm.offset))


def feed_forward(x: Tensor, call: Call, scale: float) -> Tensor:
    """x + scale f(x), x [..., dim]."""
    return _run(x, call, _NO_ATTENTION, scale)


def attend(
    x: Tensor, call: Call, lengths: tuple[int, ...], keys: Tensor, values: Tensor, seen: Bounds, heads: int,
    angles: tuple[Tensor, Tensor] | None, interleaved: bool, *, softmax: float, window: int | None,
    softcap: float | None, scale: float,
) -> Tensor:  # fmt: skip
    """x + scale f(x); x holds `lengths` tokens of each sequence in turn, whose keys and values go to where the last
    ones of `seen` are in `keys` and `values` (see landmark.ops.attention.decode). `softmax` multiplies scores."""
    cos, sin = angles or (None, None)
    middle = decode.fields(
        x, keys, values, None, lengths, seen, heads, scale=softmax, window=window, softcap=softcap,
        fresh=decode.Fresh(x, x, cos, sin, interleaved), norms=call.heads,
    )  # fmt: skip
    return _run(x, call, middle, scale)


def _run(x: Tensor, call: Call, middle: tuple[float, ...], scale: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    weights, answer, act, size, norm, _ = call
    threads = torch.get_num_threads() if size > ONE_THREAD else 1
    dim = x.shape[-1]
    _kernel(x.dtype)(
        _pack(x.data_ptr(), y.data_ptr(), *weights, answer, x.numel() // dim, dim, act, threads, *middle, *norm, scale)
    )
    return y


@cache
def _kernel(dtype: torch.dtype) -> Any:
    return SOURCE.function(f"step_{SUFFIX[dtype]}", c_char_p)


@cache
def _answer(dtype: torch.dtype) -> int:
    return decode.SOURCE.address(f"answer_{SUFFIX[dtype]}")

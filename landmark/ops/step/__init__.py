"""Residual sublayers of a few tokens, one after the other, in one call of a C kernel (step.c):
x + scale after(f(before(x))), where f is attention over a cache, a feed-forward function or experts, and before and
after are norms or nothing.

What Python spends between the kernels of a layer is more than a small model's layer takes, and a quarter of what a
large one's does whose weights have four bits. The same kernels run, in the same order, in one team of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_char, c_int64, c_void_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activation import ACTIVATIONS
from ..attention import decode
from ..moe import choose
from ..moe import experts as mixture
from ..native import Source

SOURCE = Source(Path(__file__).with_name("step.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
KINDS = {name: kind for kind, name in enumerate(ACTIVATIONS)}  # as act.h's enum
MAX_TOKENS = 16
_NORM = "2Pq2f"
_STEP = Struct(
    f"{2 * _NORM}2P3q{'4P2q' * 4}P3q2f3P{choose.SIZE}s{mixture.SIZE}s{decode.FIXED}"
)  # step.c's Step, up to what changes from token to token
_SEEN = Struct(decode.SEEN)
SIZE = _STEP.size + _SEEN.size
_NO_ATTENTION = (0,) * 12 + (0.0,) * 4
_NO_EXPERTS = (0, 0, 0, b"", b"")


class Map(NamedTuple):
    """y = x W^T + b, wherever its numbers lie."""

    kind: int  # the address of a Kind of maps.h
    fields: tuple[int, ...]  # of maps.h's Map
    width: int
    bytes: int


_NO_WEIGHTS = Map(0, (0, 0, 0, 0, 0, 0), 0, 0)


class Norm(NamedTuple):
    """RMSNorm, or where it is `centred` LayerNorm, by numbers of x's type at these addresses (0: none)."""

    weight: int = 0
    bias: int = 0
    centred: bool = False
    eps: float = 0.0
    offset: float = 0.0


class Frame(NamedTuple):
    """What a step has around its function. Where it stands `aside`, it reads what the step before it read, and is added
    to what that one came to (GPT-J's parallel sublayers)."""

    before: Norm = Norm()
    after: Norm = Norm()
    scale: float = 1.0
    aside: bool = False


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


def feed_forward(frame: Frame, first: Sequence[Map], down: Map, act: str) -> bytes:
    """A step of down(act(gate(x)) up(x)), or with one map of down(act(up(x)))."""
    return _packed(frame, first, down, (0, KINDS[act]))


def experts(frame: Frame, choice: bytes, each: bytes, bytes_read: int, dtype: torch.dtype) -> bytes:
    """A step of experts, as `choose.packed` and `experts.packed` have what chooses them and what they do; a token reads
    so many bytes of them; `dtype` is x's."""
    own = (choose.address(dtype), *mixture.addresses(dtype), choice, each)
    return _packed(frame, (), _NO_WEIGHTS, (0, 0), bytes_read=bytes_read, experts=own)


def attention(
    frame: Frame, qkv: Sequence[Map], out: Map, heads: tuple[int, int, int], interleaved: bool, *, softmax: float,
    softcap: float | None, head_norms: tuple[Norm, Norm] | None, dtype: torch.dtype,
) -> bytes:  # fmt: skip
    """A step of out(attention), once `look` has said over what. `heads`: of queries, of keys, and the size of one;
    `softmax` multiplies scores; `head_norms` are of queries and keys, alike but for their weights; `dtype` is x's."""
    q, k = head_norms or (Norm(), Norm())
    norms = (q.weight, k.weight, softmax, softcap or 0.0, q.eps, q.offset)
    middle = (0, 0, 0, 0, *heads, heads[2], 1, interleaved, *norms)
    return _packed(frame, qkv, out, (_answer(dtype), 0), middle=middle)


def _packed(
    frame: Frame, first: Sequence[Map], last: Map, between: tuple[int, int], *, bytes_read: int = 0,
    experts: tuple[Any, ...] = _NO_EXPERTS, middle: tuple[float, ...] = _NO_ATTENTION,
) -> bytes:  # fmt: skip
    maps = (*first, *[_NO_WEIGHTS] * 3)[:3]
    size = bytes_read + last.bytes + sum(m.bytes for m in first)
    return _STEP.pack(
        *frame.before, *frame.after, maps[0].kind, last.kind, len(first), maps[0].width, last.width,
        *(field for m in maps for field in m.fields), *last.fields, *between, size, frame.aside, frame.scale, 0.0,
        *experts, *middle,
    ) + bytes(_SEEN.size)  # fmt: skip


def look(steps: bytearray, n: int, seen: tuple[int, ...]) -> None:
    """Tell the n-th step, which is attention, what its queries see (as landmark.ops.attention.decode lays it out):
    new keys and values go to where the last ones are."""
    _SEEN.pack_into(steps, n * SIZE + _STEP.size, *seen)


def run(x: Tensor, steps: bytearray, first: int, count: int) -> Tensor:
    """`count` of the steps from the `first` on, of x [..., dim]."""
    x = x.contiguous()
    y = torch.empty_like(x)
    dim = x.shape[-1]
    at = addressof(c_char.from_buffer(steps, first * SIZE))
    _kernel(x.dtype)(at, count, x.data_ptr(), y.data_ptr(), x.numel() // dim, dim, torch.get_num_threads())
    return y


@cache
def _kernel(dtype: torch.dtype) -> Any:
    return SOURCE.function(f"steps_{SUFFIX[dtype]}", c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64)


@cache
def _answer(dtype: torch.dtype) -> int:
    return decode.SOURCE.address(f"answer_{SUFFIX[dtype]}")

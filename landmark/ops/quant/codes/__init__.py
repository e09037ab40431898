"""Linear maps whose weights are codes: integers of 4 or 8 bits in groups of 32, or bfloat16 in 11 bits without loss.

They are read at memory speed where rows are few. Up to `MAX_ROWS` rows of x meet numbers that are restored in
registers, and a row's result does not depend on how many there are; more rows meet a weight that is restored in memory,
in the precision of x. With `round_x`, which goes with integers, x is rounded to 8 bits, in groups of 32 columns too:
products are of integers, twice as fast where arithmetic is what takes the time, and no row depends on the others,
however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from ctypes import c_char_p, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...inference import inference_op
from ...native import Source
from ...operator import operator
from ...products import widened
from . import exact, reference
from .reference import Bits, room, unit

Backend = Literal["reference", "few", "restored"]
GROUPED, ROUNDED, EXACT = (Source(Path(__file__).with_name(f"{name}.c")) for name in ("grouped", "rounded", "exact"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
MAX_ROWS = 96  # beyond them a product of restored weights is as fast
PIECE = 2**22  # bytes of restored weights at a time
AT_ONCE = 2**18  # numbers of x that are rounded at a time
ONE_THREAD = 2**17  # bytes of codes that a second thread would not read any sooner
_pack = Struct("4P2q").pack  # maps.h's Map


Piece = tuple[slice, Tensor]


class Map(NamedTuple):
    """x -> x W^T + b by the codes of a W [rows, width]."""

    codes: Tensor
    side: Tensor
    bias: Tensor | None  # [rows], of x's type
    rows: int


def source(bits: int, round_x: bool = False) -> Source:
    """Where the kernels are."""
    if bits == 11 and round_x:
        raise ValueError("x is rounded where weights are of 4 or 8 bits, not of 11")
    return EXACT if bits == 11 else ROUNDED if round_x else GROUPED


def why_not(backend: Backend, x: Tensor, codes: Tensor, bits: Bits, round_x: bool = False) -> str | None:
    """None if `backend` can run, else why not."""
    if backend not in ("reference", "few", "restored"):
        raise ValueError(f"unknown backend {backend!r}: use 'reference', 'few' or 'restored'")
    if backend == "reference":
        return None
    if not (x.is_cpu and codes.is_cpu):
        return f"it runs on cpu, not {x.device.type}"
    if x.dtype not in SUFFIX:
        return f"it takes float32 and bfloat16, not {x.dtype}"
    if backend == "few":
        if torch.is_grad_enabled() and x.requires_grad:
            return "it has no gradient"
        rows = x.numel() // max(1, x.shape[-1])
        if rows == 0 or (rows > MAX_ROWS and rows > most_rows(bits, x.dtype, round_x)):
            return f"it takes 1 to {MAX_ROWS} rows, not {rows}"
    return source(bits, round_x and backend == "few").why_not()


@cache
def most_rows(bits: Bits, dtype: torch.dtype, round_x: bool) -> int:
    """How many rows of x the kernel takes at the speed of any."""
    if bits == 11 and EXACT.why_not() is None:
        return c_int64.from_address(EXACT.address(f"most_rows_{SUFFIX[dtype]}")).value
    return 2**63 - 1 if round_x else MAX_ROWS


def linear(
    x: Tensor,
    codes: Tensor,
    side: Tensor,
    bias: Tensor | None,
    bits: Bits,
    rows: int,
    *,
    round_x: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """y = x W^T + b; x [..., width], codes and side as `encode` makes them of a W [rows, width], bias [rows] of x's
    type -> [..., rows]. `round_x`: to 8 bits, see `reference.rounded`. Differentiable in x."""
    if backend is not None and (reason := why_not(backend, x, codes, bits, round_x)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    run = _RUN[backend or _fastest(x, codes, bits, round_x)]
    return run(x, codes, side, bias, bits, rows, round_x)


def _fastest(x: Tensor, codes: Tensor, bits: Bits, round_x: bool) -> Backend:
    return next(name for name in _RUN if why_not(name, x, codes, bits, round_x) is None)


def linears(x: Tensor, maps: Sequence[Map], bits: Bits, round_x: bool = False) -> list[Tensor]:
    """`linear` by each of several maps, for few rows of x in one call."""
    if why_not("few", x, maps[0].codes, bits, round_x) is None and not torch.compiler.is_compiling():
        return _few_each(x, maps, bits, round_x)
    return [linear(x, m.codes, m.side, m.bias, bits, m.rows, round_x=round_x) for m in maps]


def encode(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """weight [rows, width] -> codes and side. Raises ValueError for other numbers than bfloat16 in 11 bits."""
    if bits == 11 and weight.is_cpu and EXACT.why_not() is None:
        return _exactly(weight)
    return reference.encode(weight, bits)


def _exactly(weight: Tensor) -> tuple[Tensor, Tensor]:
    exact.check(weight)
    weight = weight.detach().contiguous()
    rows, width = weight.shape
    codes = torch.empty(exact.codes_shape(rows, width), dtype=torch.uint8)
    side = torch.zeros(exact.side_shape(rows, width), dtype=torch.int32)
    arguments = c_int64, c_int64, c_int
    tables = EXACT.function("tables", c_void_p, c_void_p, *arguments)
    tables(weight.data_ptr(), side.data_ptr(), rows, width, threads := torch.get_num_threads())
    starts = side[: len(codes) + 1]
    starts.copy_(starts.cumsum(0))
    side = F.pad(side, (0, exact.side_shape(rows, width, int(starts[-1]))[0] - len(side)))
    write = EXACT.function("encode", *[c_void_p] * 3, *arguments)
    write(weight.data_ptr(), codes.data_ptr(), side.data_ptr(), rows, width, threads)
    return codes, side


def restore(codes: Tensor, side: Tensor, bits: Bits, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """The weight [rows, width] that codes and side stand for."""
    if codes.is_cpu and dtype in SUFFIX and source(bits).why_not() is None:
        return _restore(codes, side, bits, rows, width, dtype)
    return reference.restore(codes, side, bits, rows, width, dtype)


@cache
def _kernel(bits: int, dtype: torch.dtype, round_x: bool) -> Any:
    return source(bits, round_x).function(f"linear_{bits}_{SUFFIX[dtype]}", c_void_p, c_char_p, *[c_int64] * 3, c_int)


@cache
def kind(bits: int, dtype: torch.dtype, round_x: bool) -> int | None:
    """The address of maps.h's Kind of codes that meet an x of `dtype`; None where there is no kernel."""
    own = source(bits, round_x)
    return own.address(f"kind_{bits}_{SUFFIX[dtype]}") if dtype in SUFFIX and own.why_not() is None else None


def _few_each(x: Tensor, maps: Sequence[Map], bits: int, round_x: bool) -> list[Tensor]:
    x = x.contiguous()
    *lead, width = x.shape
    maps = [m if m.bias is None or m.bias.is_contiguous() else m._replace(bias=m.bias.contiguous()) for m in maps]
    found, table, size = [], b"", 0
    for codes, side, bias, rows in maps:
        y = x.new_empty((*lead, rows))
        table += _pack(codes.data_ptr(), side.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), rows, 0)
        size += codes.numel()
        found.append(y)
    threads = torch.get_num_threads() if size > ONE_THREAD else 1
    _kernel(bits, x.dtype, round_x)(x.data_ptr(), table, len(found), x.numel() // width, width, threads)
    return found


def _few(x: Tensor, codes: Tensor, side: Tensor, bias: Tensor | None, bits: int, rows: int, round_x: bool) -> Tensor:
    return _few_each(x, [Map(codes, side, bias, rows)], bits, round_x)[0]


def _fake(
    x: Tensor, codes: Tensor, side: Tensor, bias: Tensor | None, bits: int, rows: int, round_x: bool = False
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


few = inference_op("codes_few", _few, _fake)


@cache
def _restore_kernel(bits: int, dtype: torch.dtype) -> Any:
    return source(bits).function(f"restore_{bits}_{SUFFIX[dtype]}", c_char_p, *[c_int64] * 3, c_int)


def _restore_units(codes: Tensor, side: Tensor, bits: int, rows: int, y: Tensor, first: int, last: int) -> None:
    """Units [first, last) become y's rows."""
    threads = torch.get_num_threads() if codes[0].numel() * (last - first) > ONE_THREAD else 1
    of = _pack(codes.data_ptr(), side.data_ptr(), 0, y.data_ptr(), rows, 0)
    _restore_kernel(bits, y.dtype)(of, y.shape[1], first, last, threads)


def restore_rows(codes: Tensor, side: Tensor, bits: Bits, ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [n] of the weight, [n, width]."""
    if codes.is_cpu and dtype in SUFFIX and source(bits).why_not() is None:
        return _picked(codes, side, bits, ids, width, dtype)
    return reference.restore_rows(codes, side, bits, ids, width, dtype)


def _pick(codes: Tensor, side: Tensor, bits: int, ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    ids, most = ids.contiguous(), len(codes) * unit(bits)
    y = torch.empty(len(ids), width, dtype=dtype)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < most:
        raise IndexError(f"rows {ids.tolist()} are asked for; there are {most}")
    of = _pack(codes.data_ptr(), side.data_ptr(), 0, y.data_ptr(), most, 0)
    _pick_kernel(bits, dtype)(of, width, ids.data_ptr(), len(ids))
    return y


@cache
def _pick_kernel(bits: int, dtype: torch.dtype) -> Any:
    return source(bits).function(f"rows_{bits}_{SUFFIX[dtype]}", c_char_p, c_int64, c_void_p, c_int64)


def _fake_rows(codes: Tensor, side: Tensor, bits: int, ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(len(ids), width, dtype=dtype)


_picked = inference_op("codes_rows", _pick, _fake_rows)


@operator("codes_restore")
def _restore(codes: Tensor, side: Tensor, bits: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    y = torch.empty(rows, width, dtype=dtype)
    _restore_units(codes, side, bits, rows, y, 0, len(codes))
    return y


@_restore.register_fake
def _(codes: Tensor, side: Tensor, bits: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, width, dtype=dtype, device=codes.device)


def _pieces(codes: Tensor, side: Tensor, bits: int, rows: int, width: int, dtype: torch.dtype) -> Iterator[Piece]:
    """The weight's rows [n, width], some at a time in one piece of memory that stays near, and which they are."""
    high = unit(bits)
    count = max(2, PIECE // (high * width * dtype.itemsize))
    space = torch.empty(min(count * high, rows), width, dtype=dtype)
    for first in range(0, len(codes), count):
        last = min(first + count, len(codes))
        here = slice(first * high, min(rows, last * high))
        piece = space[: here.stop - here.start]
        _restore_units(codes, side, bits, rows, piece, first, last)
        yield here, piece


def _restored(
    x: Tensor, codes: Tensor, side: Tensor, bias: Tensor | None, bits: int, rows: int, round_x: bool
) -> Tensor:
    return _by_pieces(_rounded(x) if round_x else x, codes, side, bias, bits, rows)


def _rounded(x: Tensor) -> Tensor:
    """`reference.rounded` in x's type; without gradient some rows at a time, for what it has in between is many times
    as large."""
    if x.requires_grad or not x.numel() or torch.compiler.is_compiling():
        return reference.rounded(x).to(x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    y, step = torch.empty_like(flat), max(1, AT_ONCE // flat.shape[1])
    for first in range(0, len(flat), step):
        y[first : first + step] = reference.rounded(flat[first : first + step])
    return y.view(x.shape)


def _multiplied(x: Tensor) -> Tensor:
    """x as it is multiplied: in float32 where the processor has no products of bfloat16; then the weight is restored in
    float32 as well, and is rounded once less than if `products.mm` widened it."""
    return x.float() if widened(x) else x


@operator("codes_linear")
def _by_pieces(x: Tensor, codes: Tensor, side: Tensor, bias: Tensor | None, bits: int, rows: int) -> Tensor:
    y = x.new_empty(x.numel() // max(1, x.shape[-1]), rows)
    flat = _multiplied(x.reshape(-1, x.shape[-1]))
    for here, weight in _pieces(codes, side, bits, rows, x.shape[-1], flat.dtype):
        y[:, here] = F.linear(flat, weight, None if bias is None else bias[here].to(flat.dtype))
    return y.view(*x.shape[:-1], rows)


@operator("codes_linear_x")
def _restored_x(grad: Tensor, codes: Tensor, side: Tensor, bits: int, rows: int, width: int) -> Tensor:
    flat = _multiplied(grad.reshape(-1, rows))
    y = grad.new_zeros(len(flat), width, dtype=torch.float32)
    for here, weight in _pieces(codes, side, bits, rows, width, flat.dtype):
        y += flat[:, here] @ weight
    return y.to(grad.dtype).view(*grad.shape[:-1], width)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, side, _, ctx.bits, ctx.rows = inputs
    ctx.width = x.shape[-1]
    ctx.save_for_backward(codes, side)  # the weight is restored again, not kept


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, side = ctx.saved_tensors
    bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
    x = _restored_x(grad, codes, side, ctx.bits, ctx.rows, ctx.width) if ctx.needs_input_grad[0] else None
    return x, None, None, bias, None, None


_by_pieces.register_fake(_fake)
_by_pieces.register_autograd(_backward, setup_context=_setup)


@_restored_x.register_fake
def _(grad: Tensor, codes: Tensor, side: Tensor, bits: int, rows: int, width: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], width)


_RUN: dict[Backend, Callable[[Tensor, Tensor, Tensor, Tensor | None, Bits, int, bool], Tensor]] = {
    "few": few,
    "restored": _restored,
    "reference": reference.linear,
}  # the first that can run is the fastest

__all__ = [
    "Backend", "Bits", "Map", "encode", "exact", "kind", "linear", "linears", "reference", "restore", "restore_rows",
    "room", "why_not",
]  # fmt: skip

"""Coded experts of a few tokens in one call of a C kernel (coded.c): what a decoded token passes, at the speed of
reading the codes."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_char_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activation import ACTIVATIONS
from ..native import Source
from ..quant.codes import Bits, kind

SOURCE = Source(Path(__file__).with_name("coded.c"))
KERNELS = {torch.float32: "coded_f32", torch.bfloat16: "coded_bf16"}
KINDS = {name: kind for kind, name in enumerate(ACTIVATIONS)}  # as act.h's enum
MAX_TOKENS = 64  # beyond them one call an expert costs nothing
ONE_THREAD = 2**17  # bytes of codes that a second thread would not read any sooner
_pack = Struct(f"5P{3 * '2P3q'}8q").pack  # coded.c's Call
_NONE = (0, 0, 0, 0, 0)


class Stack(NamedTuple):
    """The codes of one matrix an expert, [experts, ...], what they need besides, and each matrix's rows and width."""

    codes: Tensor
    side: Tensor
    rows: int
    width: int


@cache
def _kernel(dtype: torch.dtype) -> Any:
    return SOURCE.function(KERNELS[dtype], c_char_p)


def why_not(x: Tensor, bits: Bits, round_x: bool) -> str | None:
    """None if the kernel can run on tokens x [N, dim] and codes of so many bits, else why not."""
    if not x.is_cpu or x.dtype not in KERNELS:
        return f"it takes float32 and bfloat16 on cpu, not {x.dtype} on {x.device.type}"
    if bits == 11:
        return "what goes with codes of 11 bits has another size for each expert"
    if torch.is_grad_enabled() and x.requires_grad:
        return "it has no gradient"
    if not 0 < len(x) <= MAX_TOKENS:
        return f"it takes 1 to {MAX_TOKENS} tokens, not {len(x)}"
    if torch.compiler.is_compiling():
        return "compilers do not see through it"
    if kind(bits, x.dtype, round_x) is None:
        return "there is no kernel for such codes"
    return SOURCE.why_not()


def feed_forward(
    x: Tensor, inner: Sequence[Stack], down: Stack, bits: Bits, round_x: bool, act: str, experts: Tensor,
    weights: Tensor, on_input: bool = False,
) -> Tensor:  # fmt: skip
    """y[n] = sum_j weights[n, j] down_e (act(gate_e x[n]) up_e x[n]) with e = experts[n, j], for arguments that
    `why_not` accepts; act(up_e x[n]) where `inner` is up alone, not gate and up.

    x [N, dim]; experts [N, k], -1 for a choice that is dropped; weights [N, k] in float32, which multiply inputs
    instead if `on_input`. With `round_x` what meets a matrix is rounded to 8 bits. -> [N, out].
    """
    x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
    (tokens, dim), active, number = x.shape, experts.shape[1], len(down.codes)
    y = x.new_empty(tokens, down.rows)
    read = min(tokens * active, number) * (down.codes[0].numel() + sum(s.codes[0].numel() for s in inner))
    places = [_place(s) for s in (*inner, down)]
    call = _pack(
        kind(bits, x.dtype, round_x), x.data_ptr(), experts.data_ptr(), weights.data_ptr(), y.data_ptr(), *places[0],
        *(places[1] if len(inner) > 1 else _NONE), *places[-1], len(inner), tokens, active, number, dim, KINDS[act],
        on_input, torch.get_num_threads() if read > ONE_THREAD else 1,
    )  # fmt: skip
    _kernel(x.dtype)(call)
    return y


def _place(stack: Stack) -> tuple[int, ...]:
    codes, side = stack.codes, stack.side
    each = codes.stride(0), side.stride(0) * side.itemsize  # a code is a byte
    return codes.data_ptr(), side.data_ptr(), stack.rows, *each

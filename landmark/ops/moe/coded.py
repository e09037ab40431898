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
_call = Struct(f"5P{3 * '2P4q'}8q")  # experts.h's Experts
SIZE = _call.size
_NONE = (0, 0, 0, 0, 0, 0)


class Stack(NamedTuple):
    """One matrix [rows, width] an expert: its codes and what they need besides, [experts, ...] each; with no side, the
    numbers themselves."""

    codes: Tensor
    side: Tensor | None
    rows: int
    width: int

    @property
    def bytes(self) -> int:
        """Of one expert."""
        return self.codes[0].nbytes


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
    tokens, active, number = len(x), experts.shape[1], len(down.codes)
    y = x.new_empty(tokens, down.rows)
    read = min(tokens * active, number) * (down.bytes + sum(s.bytes for s in inner))
    own, threads = kind(bits, x.dtype, round_x), torch.get_num_threads() if read > ONE_THREAD else 1
    assert own is not None
    places = x.data_ptr(), experts.data_ptr(), weights.data_ptr(), y.data_ptr(), tokens
    _kernel(x.dtype)(packed(own, inner, down, active, act, on_input, *places, threads))
    return y


def packed(
    kind: int, inner: Sequence[Stack], down: Stack, active: int, act: str, on_input: bool, x: int = 0, experts: int = 0,
    weights: int = 0, y: int = 0, tokens: int = 0, threads: int = 1,
) -> bytes:  # fmt: skip
    """experts.h's Experts; of tensors their addresses."""
    places = [_place(s) for s in (*inner, down)]
    return _call.pack(
        kind, x, experts, weights, y, *places[0], *(places[1] if len(inner) > 1 else _NONE), *places[-1], len(inner),
        tokens, active, len(down.codes), inner[0].width, KINDS[act], on_input, threads,
    )  # fmt: skip


def addresses(dtype: torch.dtype) -> tuple[int, int]:
    """Of what says how much space a call takes, and of what the threads of a team do."""
    suffix = KERNELS[dtype].removeprefix("coded_")
    return SOURCE.address(f"room_{suffix}"), SOURCE.address(f"each_{suffix}")


def _place(stack: Stack) -> tuple[int, ...]:
    codes, side = stack.codes, stack.side
    each = stack.codes.stride(0) * codes.itemsize
    if side is None:
        return codes.data_ptr(), 0, stack.rows, stack.width, each, 0
    return codes.data_ptr(), side.data_ptr(), stack.rows, 0, each, side.stride(0) * side.itemsize

"""Experts of a few tokens in one call of a C kernel (experts.c): what a decoded token passes, at the speed of reading
its experts' weights, numbers or codes."""

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

SOURCE = Source(Path(__file__).with_name("experts.c"))
KERNELS = {torch.float32: "experts_f32", torch.bfloat16: "experts_bf16"}
KINDS = {name: kind for kind, name in enumerate(ACTIVATIONS)}  # as act.h's enum
MAX_TOKENS, MAX_PLAIN = 64, 16  # of codes, and of numbers: beyond them one call an expert costs nothing
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


def why_not(x: Tensor, stacks: Sequence[Stack]) -> str | None:
    """None if the kernel can run on tokens x [N, dim] and matrices of one kind that take their type, else why not."""
    if not x.is_cpu or x.dtype not in KERNELS:
        return f"it takes float32 and bfloat16 on cpu, not {x.dtype} on {x.device.type}"
    plain = any(s.side is None for s in stacks)
    if torch.is_grad_enabled() and (x.requires_grad or any(s.codes.requires_grad for s in stacks)):
        return "it has no gradient"
    if not 0 < len(x) <= (most := MAX_PLAIN if plain else MAX_TOKENS):
        return f"it takes 1 to {most} tokens, not {len(x)}"
    if torch.compiler.is_compiling():
        return "compilers do not see through it"
    if plain and torch.is_autocast_enabled("cpu"):
        return "autocast picks the dtype"
    return SOURCE.why_not()


def feed_forward(
    x: Tensor, kind: int, inner: Sequence[Stack], down: Stack, act: str, experts: Tensor, weights: Tensor,
    on_input: bool = False,
) -> Tensor:  # fmt: skip
    """y[n] = sum_j weights[n, j] down_e (act(gate_e x[n]) up_e x[n]) with e = experts[n, j], for arguments that
    `why_not` accepts; act(up_e x[n]) where `inner` is up alone, not gate and up.

    x [N, dim]; kind: the address of a Kind of maps.h, of all matrices; experts [N, k], -1 for a choice that is dropped;
    weights [N, k] in float32, which multiply inputs instead if `on_input`. -> [N, out].
    """
    x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
    tokens, active, number = len(x), experts.shape[1], len(down.codes)
    y = x.new_empty(tokens, down.rows)
    read = min(tokens * active, number) * (down.bytes + sum(s.bytes for s in inner))
    places = x.data_ptr(), experts.data_ptr(), weights.data_ptr(), y.data_ptr(), tokens
    threads = torch.get_num_threads() if read > ONE_THREAD else 1
    _kernel(x.dtype)(packed(kind, inner, down, active, act, on_input, *places, threads))
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
    suffix = KERNELS[dtype].removeprefix("experts_")
    return SOURCE.address(f"room_{suffix}"), SOURCE.address(f"each_{suffix}")


def _place(stack: Stack) -> tuple[int, ...]:
    codes, side = stack.codes, stack.side
    each = stack.codes.stride(0) * codes.itemsize
    if side is None:
        return codes.data_ptr(), 0, stack.rows, stack.width, each, 0
    return codes.data_ptr(), side.data_ptr(), stack.rows, 0, each, side.stride(0) * side.itemsize

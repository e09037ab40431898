"""RWKV-7's decoded token between its linear maps (Peng et al. 2025, 2503.14456, eq. 4 to 21): a C kernel, goose.c."""

from __future__ import annotations

from ctypes import c_char_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..native import Source

SOURCE = Source(Path(__file__).with_name("goose.c"))
KERNELS = {torch.float32: "goose_f32", torch.bfloat16: "goose_bf16"}
LANES, WIDEST = 16, 256
ONE_THREAD = 2**14  # numbers of states that a second thread would not edit any sooner
_PLAIN = (Tensor, Parameter)
_pack = Struct("16P4q2d").pack  # goose.c's Call


@cache
def _kernel(dtype: torch.dtype) -> Any:
    return SOURCE.function(KERNELS[dtype], c_char_p)


def why_not(head_dim: int, state: Tensor, *tensors: Tensor | None) -> str | None:
    """None if the kernel can run on the tensors that `goose` takes, all but the state of one dtype, else why not."""
    dtype = None
    for t in tensors:
        if t is None:
            continue
        dtype = dtype or t.dtype
        if type(t) not in _PLAIN or not t.is_cpu or t.dtype != dtype:
            return f"it takes plain tensors of one dtype on cpu, not {type(t).__name__} {t.dtype} on {t.device.type}"
    if dtype not in KERNELS or state.dtype != torch.float32:
        return f"it takes float32 and bfloat16, and states in float32, not {dtype} and {state.dtype}"
    if head_dim % LANES or head_dim > WIDEST:
        return f"it takes heads as wide as a multiple of {LANES}, to {WIDEST}, not {head_dim}"
    if torch.is_grad_enabled():
        return "it has no gradient"
    if torch.compiler.is_compiling():
        return "compilers do not see through it"
    return SOURCE.why_not()


def goose(
    r: Tensor, k: Tensor, v: Tensor, rate: Tensor, decay: Tensor, gate: Tensor, mix: Tensor | None,
    first: Tensor | None, remove: Tensor, replace: Tensor, bonus: Tensor, scale: Tensor, shift: Tensor,
    state: Tensor, *, slowest: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of each sequence, for arguments that `why_not` accepts.

    r, k, v, gate [n, 1, C]; rate and decay as their linear maps give them; mix and first (both or none): how much of
    the first layer's values (before its sigmoid), and these. remove, replace, bonus, the norm's scale and shift: C
    numbers; state [n, H, N, N], keys by values. -> what the output matrix reads [n, 1, C], and the state after.
    """
    rows = [None if t is None else t.contiguous() for t in (r, k, v, rate, decay, gate, mix, first)]
    own = [t.contiguous() for t in (remove, replace, bonus, scale, shift)]
    state, (_, heads, width, _) = state.contiguous(), state.shape
    y, after, tokens = torch.empty_like(r), torch.empty_like(state), r.numel() // (heads * width)
    call = _pack(
        *(0 if t is None else t.data_ptr() for t in rows), *(t.data_ptr() for t in own), state.data_ptr(),
        after.data_ptr(), y.data_ptr(), tokens, heads, width,
        torch.get_num_threads() if state.numel() > ONE_THREAD else 1, slowest, eps,
    )  # fmt: skip
    _kernel(r.dtype)(call)
    return y, after

"""Attention on the processor, forward and backward: a C kernel that works a tile of scores at a time (flash.c)."""

from __future__ import annotations

from ctypes import c_char_p
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ...ctx import Bounds
from ..native import Source
from ..operator import Operator
from .reference import reference

SOURCE = Source(Path(__file__).with_name("flash.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
ROWS = 256  # of a forward task, as flash.c's WIDE
_PLAIN = (Tensor, Parameter)


_pack = Struct("10P19q2f").pack  # flash.c's Call


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    return SOURCE.function(f"{name}_{SUFFIX[dtype]}", c_char_p)


def why_not(q: Tensor, k: Tensor, v: Tensor, *, dropout: float, bias: Tensor | None) -> str | None:
    """None if the kernel can serve a call of `attention`, else why not."""
    if q.device.type != "cpu" or q.dtype not in SUFFIX or not q.dtype == k.dtype == v.dtype:
        return "it takes float32 and bfloat16 on cpu"
    if type(q) not in _PLAIN or type(k) not in _PLAIN or type(v) not in _PLAIN:
        return f"it takes plain tensors, not {type(q).__name__}, {type(k).__name__} and {type(v).__name__}"
    if dropout:
        return "it has no dropout"
    if bias is not None:
        return "it has no bias"
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return "it takes no empty tensors"
    return SOURCE.why_not()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bounds: Bounds,
    k_bounds: Bounds,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """As `attention`, for arguments that `why_not` accepts. A query that sees no key gives 0."""
    group = q.shape[2] // k.shape[2]
    key = ("flash", k_bounds.rows, k_bounds.width, k_bounds.spans, causal, window, group)  # compilers hash no dataclass
    blocks, sequences, covered = bounds.memo(key, lambda: _plan(bounds, k_bounds, causal, window, group))
    out, _ = flash(q, k, v, blocks, sequences, scale, softcap or 0.0, causal, window or 0, covered)
    return out


def _plan(
    bounds: Bounds, k_bounds: Bounds, causal: bool, window: int | None, group: int
) -> tuple[Tensor, Tensor, bool]:
    """Tasks of the forward and of the backward pass, the longest first, and whether every token is in a sequence.

    A task is [first query, queries, first key, keys, first row, end of rows], its rows those of all heads of a group.
    """
    blocks: list[tuple[int, tuple[int, ...]]] = []
    sequences: list[tuple[int, tuple[int, ...]]] = []
    for (qs, tq), (ks, tk) in zip(bounds.sequences, k_bounds.sequences, strict=True):
        rows = tq * group
        for first in range(0, rows, ROWS):
            end = min(first + ROWS, rows)
            last = tk - tq + (end - 1) // group + 1
            seen = min(last, tk) if causal else tk
            if window is not None:
                seen = min(seen, window + ROWS // group)
            blocks.append(((end - first) * seen, (qs, tq, ks, tk, first, end)))
        sequences.append((rows * tk, (qs, tq, ks, tk, 0, rows)))
    covered = all(sum(n for _, n in b.sequences) == b.rows * b.width for b in (bounds, k_bounds))

    def longest_first(tasks: list[tuple[int, tuple[int, ...]]]) -> Tensor:
        ordered = [task for _, task in sorted(tasks, key=lambda work: work[0], reverse=True)]
        return torch.tensor(ordered, dtype=torch.int64).view(-1, 6)

    return longest_first(blocks), longest_first(sequences), covered


def _call(
    name: str,
    tensors: tuple[Tensor | None, ...],
    tasks: Tensor,
    scale: float,
    softcap: float,
    causal: bool,
    window: int,
) -> None:
    """Run a kernel on q, k, v, out, lse, grad, dq, dk, dv."""
    q, k, v, *_ = tensors
    assert q is not None and k is not None and v is not None
    (_, q_width, heads, d), (_, k_width, kv_heads, d_v) = q.shape, v.shape
    call = _pack(
        *[0 if x is None else x.data_ptr() for x in tensors], tasks.data_ptr(), tasks.shape[0], heads, kv_heads, d, d_v,
        q_width, k_width, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], causal, window, torch.get_num_threads(),
        scale, softcap,
    )  # fmt: skip
    _kernel(name, q.dtype)(call)


def _unit(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, sequences: Tensor,
    scale: float, softcap: float, causal: bool, window: int, covered: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = _unit(q, k, v)
    shape = (*q.shape[:3], v.shape[3])
    out = torch.empty(shape, dtype=q.dtype) if covered else torch.zeros(shape, dtype=q.dtype)
    lse = torch.empty(shape[:3], dtype=torch.float32)
    _call("forward", (q, k, v, out, lse, None, None, None, None), blocks, scale, softcap, causal, window)
    return out, lse


def _backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sequences: Tensor,
    scale: float, softcap: float, causal: bool, window: int, covered: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = _unit(q, k, v)
    grad, out = grad.contiguous(), out.contiguous()
    new = torch.empty if covered else torch.zeros
    dq, dk, dv = (new(x.shape, dtype=x.dtype) for x in (q, k, v))
    _call("backward", (q, k, v, out, lse, grad, dq, dk, dv), sequences, scale, softcap, causal, window)
    return dq, dk, dv


flash = Operator("attention", _forward)
_grads = Operator("attention_backward", _backward)


@flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@_grads.register_fake
def _(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, _, sequences, *ctx.options = inputs
    ctx.save_for_backward(*output, q, k, v, sequences)
    ctx.mark_non_differentiable(output[1])


def _vjp(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, q, k, v, sequences = ctx.saved_tensors
    if torch.is_grad_enabled():
        return (*_again(grad, q, k, v, sequences, *ctx.options), *[None] * 7)
    return (*_grads(grad, out, lse, q, k, v, sequences, *ctx.options), *[None] * 7)


def _again(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sequences: Tensor,
    scale: float, softcap: float, causal: bool, window: int, covered: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients that can be differentiated again (create_graph=True), by the reference."""
    spans = sequences.tolist()
    bounds = Bounds(q.shape[0], q.shape[1], tuple((at, n) for at, n, *_ in spans))
    k_bounds = Bounds(k.shape[0], k.shape[1], tuple((at, n) for _, _, at, n, *_ in spans))
    out = reference(
        q, k, v, bounds=bounds, k_bounds=k_bounds, scale=scale, causal=causal, window=window or None,
        softcap=softcap or None,
    )  # fmt: skip
    wanted = [x for x in (q, k, v) if x.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(grads) if x.requires_grad else None for x in (q, k, v)]


flash.register_autograd(_vjp, setup_context=_setup)

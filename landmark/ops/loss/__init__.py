"""Cross-entropy of a linear head, in which the vocabulary-sized logits never exist at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..native import transformed
from ..operator import operator
from . import chunked, cpu, reference
from .reference import CrossEntropy, Head

Backend = Literal["reference", "torch", "cpu"]
PIECE = 2**19  # elements


def why_not(backend: Backend, hidden: Tensor) -> str | None:
    """None if `backend` can take `hidden`, else why not."""
    if backend not in ("reference", "torch", "cpu"):
        raise ValueError(f"unknown backend {backend!r}: use 'reference', 'torch' or 'cpu'")
    return cpu.why_not(hidden) if backend == "cpu" else None


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
    backend: Backend | None = None,
) -> CrossEntropy:
    """Cross-entropy of the logits softcap(scale (hidden W^T + b)), `chunk` rows of them at a time.

    hidden [N, D], weight [V, D], targets [N] (int64; -100 is ignored and costs nothing), bias [V]. Sums over the
    counted targets: divide by `count` for means. Only `.loss` has a gradient, computed in forward if it is wanted.
    Label smoothing e gives (1 - e) nll + e mean_v(-log p_v); z-loss adds z_loss logsumexp^2 (PaLM, 2022).
    `chunk` defaults to the rows of 128 MiB of logits. Autocast picks the products' dtype.
    """
    head = Head(softcap, scale, z_loss, label_smoothing)
    hidden, weight, bias = _checked(hidden, weight, targets, bias, head)
    backend = _pick(backend, hidden)
    if backend == "reference":
        return reference.cross_entropy(hidden, weight, targets, bias, head)
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    rows = chunk or chunked.default_chunk(weight)
    loss, nll, count, z, *_ = _cross_entropy(hidden, weight, targets, bias, *head, rows, backend == "cpu", needs)
    return CrossEntropy(loss, nll.detach(), count, z.detach())


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """log p(target) of each row: hidden [N, D], weight [V, D], targets [N] -> [N] float32 (float64 for float64).

    For evaluation: `chunk` rows at a time, without gradient. 0 where the target is -100.
    """
    head = Head(softcap, scale)
    hidden, weight, bias = _checked(hidden, weight, targets, bias, head)
    backend = _pick(backend, hidden)
    if backend == "reference":
        return reference.token_logprobs(hidden, weight, targets, bias, head)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        raise ValueError("token_logprobs has no gradient: call it under torch.no_grad(), or use backend='reference'")
    rows = chunk or chunked.default_chunk(weight)
    return _token_logprobs(hidden, weight, targets, bias, softcap, scale, rows, backend == "cpu")


def _checked(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, head: Head
) -> tuple[Tensor, Tensor, Tensor | None]:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)}, targets {list(targets.shape)}: "
            "they must be [N, D], [V, D] and [N]; flatten batch and time first"
        )
    if head.softcap is not None and head.softcap <= 0:
        raise ValueError(f"softcap {head.softcap} must be positive, or None for no cap")
    if not 0 <= head.label_smoothing < 1:
        raise ValueError(f"label_smoothing {head.label_smoothing} must be in [0, 1)")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        kinds = [str(t.dtype) for t in (hidden, weight, bias) if t is not None]
        raise ValueError(f"hidden, weight and bias are {', '.join(kinds)}: cast them to one dtype, or use autocast")
    return hidden, weight, bias


def _pick(backend: Backend | None, hidden: Tensor) -> Backend:
    if backend is None:
        if transformed():
            return "reference"
        return "torch" if cpu.why_not(hidden) else "cpu"
    if (reason := why_not(backend, hidden)) is not None:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    return backend


@operator("cross_entropy")
def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    z_loss: float,
    label_smoothing: float,
    chunk: int,
    native: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, count, z, and the gradients of loss with respect to hidden, weight and bias (empty if not needed)."""
    head = Head(softcap, scale, z_loss, label_smoothing)
    index, nll, lse, mean, grads = chunked.sweep(hidden, weight, targets, bias, head, chunk, native, needs)
    loss = (1 - label_smoothing) * nll + label_smoothing * (lse - mean) + z_loss * lse.square()
    total, likelihood, z = (t.sum(dtype=torch.float64).to(nll.dtype) for t in (loss, nll, lse.square()))
    count = torch.tensor(len(index), device=hidden.device)
    return total, likelihood, count, z, grads.hidden, grads.weight, grads.bias


@_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, scale: float,
    z_loss: float, label_smoothing: float, chunk: int, native: bool, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = torch.promote_types(hidden.dtype, torch.float32)
    scalars = [hidden.new_empty((), dtype=d) for d in (wide, wide, torch.int64, wide)]
    grads = chunked.Gradients(hidden, weight, bias, needs, hidden.shape[0] > chunk)
    return (*scalars, grads.hidden, grads.weight, grads.bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, bias, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(*output[4:])


def _backward(ctx: Any, loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("cross_entropy has no second derivative: use backend='reference' for create_graph=True")
    grads: list[Tensor | None] = [None, None, None]
    if loss is not None:
        for i, (g, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            if ctx.needs_input_grad[(0, 1, 3)[i]]:
                grads[i] = _scaled(g, loss, dtype)
    return grads[0], grads[1], None, grads[2], *[None] * 7


def _scaled(g: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """g * by, of another type in pieces that stay near the processor: eight times as fast as in one go."""
    if g.dtype == dtype or not g.is_cpu or g.ndim < 2:
        return torch.mul(g, by, out=g.new_empty(g.shape, dtype=dtype))
    y = torch.empty_like(g, dtype=dtype)
    rows = max(1, PIECE // g.shape[1])
    for part, out in zip(g.split(rows), y.split(rows), strict=True):
        out.copy_(part * by)
    return y


_cross_entropy.register_autograd(_backward, setup_context=_setup)


@operator("token_logprobs")
def _token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, scale: float,
    chunk: int, native: bool,
) -> Tensor:  # fmt: skip
    index, nll, *_ = chunked.sweep(hidden, weight, targets, bias, Head(softcap, scale), chunk, native)
    return nll.new_zeros(len(targets)).index_copy_(0, index, -nll)


@_token_logprobs.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, scale: float,
    chunk: int, native: bool,
) -> Tensor:  # fmt: skip
    return hidden.new_empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))


__all__ = ["Backend", "CrossEntropy", "Head", "cross_entropy", "reference", "token_logprobs", "why_not"]

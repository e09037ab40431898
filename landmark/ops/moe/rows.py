"""Planning, spreading and combining by C kernels (rows.c)."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..native import Source
from ..operator import Operator
from . import reference

SOURCE = Source(Path(__file__).with_name("rows.c"))
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
ONE_THREAD = 2**15  # elements that a second thread would not move any sooner
_P, _I, _N = c_void_p, c_int64, c_int


@cache
def _kernel(name: str, *types: Any) -> Any:
    return SOURCE.function(name, *types)


def why_not(x: Tensor, weights: Tensor | None = None) -> str | None:
    """None if the kernels can run on rows x (and weights), else why not."""
    if not x.is_cpu:
        return f"it runs on cpu, not {x.device.type}"
    if x.dtype not in SUFFIX:
        return f"it takes float32 and bfloat16, not {x.dtype}"
    if weights is not None and weights.dtype != torch.float32:
        return f"it takes weights in float32, not {weights.dtype}"
    return SOURCE.why_not()


def why_not_plan(experts: Tensor) -> str | None:
    """None if `plan` can run, else why not."""
    if (
        not experts.is_cpu
        or experts.dtype != torch.long
        or torch.compiler.is_compiling()
        or type(experts) is not Tensor
    ):
        return "it takes plain tensors of whole numbers on cpu, and compilers do not see through it"
    return SOURCE.why_not()


def plan(experts: Tensor, count: int, dropping: bool) -> tuple[Tensor, Tensor, Tensor]:
    """counts [count], tokens [M] and places [N, k] of experts [N, k]."""
    experts = experts.contiguous()
    counts, places = experts.new_empty(count), torch.empty_like(experts)
    tokens = experts.new_empty(experts.numel())
    _kernel("plan", _P, _I, _I, _I, _P, _P, _P)(
        experts.data_ptr(), *experts.shape, count, counts.data_ptr(), tokens.data_ptr(), places.data_ptr()
    )
    return counts, tokens[: int(counts.sum())] if dropping else tokens, places


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > ONE_THREAD else 1


def _spread(x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
    x, rows = x.contiguous(), x.new_empty(tokens.shape[0], x.shape[1])
    _kernel("spread", _P, _P, _P, _I, _I, _N)(
        x.data_ptr(), tokens.data_ptr(), rows.data_ptr(), len(tokens), x.shape[1] * x.itemsize, _threads(rows)
    )
    return rows


def _combine(y: Tensor, weights: Tensor | None, places: Tensor) -> Tensor:
    y, out = y.contiguous(), y.new_empty(places.shape[0], y.shape[1])
    weights = None if weights is None else weights.contiguous()
    _kernel(f"combine_{SUFFIX[y.dtype]}", _P, _P, _P, _P, _I, _I, _I, _N)(
        y.data_ptr(), None if weights is None else weights.data_ptr(), places.data_ptr(), out.data_ptr(),
        *places.shape, y.shape[1], _threads(y),
    )  # fmt: skip
    return out


def _combine_backward(grad: Tensor, y: Tensor, weights: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    grad, y, weights = grad.contiguous(), y.contiguous(), weights.contiguous()
    grad_y, grad_weights = torch.empty_like(y), torch.empty_like(weights)
    _kernel(f"combine_backward_{SUFFIX[y.dtype]}", _P, _P, _P, _P, _P, _P, _I, _I, _I, _N)(
        grad.data_ptr(), y.data_ptr(), weights.data_ptr(), places.data_ptr(), grad_y.data_ptr(),
        grad_weights.data_ptr(), *places.shape, y.shape[1], _threads(y),
    )  # fmt: skip
    return grad_y, grad_weights


spread = Operator(
    "moe_spread",
    _spread,
    lambda x, tokens, places: x.new_empty(tokens.shape[0], x.shape[1]),
)
combine = Operator(
    "moe_combine",
    _combine,
    lambda y, weights, places: y.new_empty(places.shape[0], y.shape[1]),
)
_combine_grads = Operator(
    "moe_combine_backward",
    _combine_backward,
    lambda grad, y, weights, places: (torch.empty_like(y), torch.empty_like(weights)),
)


def _spread_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _spread_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return combine(grad, None, *ctx.saved_tensors), None, None


def _combine_setup(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, weights, places = ctx.saved_tensors
    ones = torch.ones(places.shape, dtype=torch.float32) if weights is None else weights
    if torch.is_grad_enabled():  # gradients that can be differentiated again
        wanted = [t for t in (y, weights) if t is not None and t.requires_grad]
        grads = iter(torch.autograd.grad(reference.combine(y, ones, places), wanted, grad, create_graph=True))
        return (*(next(grads) if t is not None and t.requires_grad else None for t in (y, weights)), None)
    grad_y, grad_weights = _combine_grads(grad, y, ones, places)
    return grad_y, None if weights is None else grad_weights, None


torch.library.register_autograd("landmark::moe_spread", _spread_vjp, setup_context=_spread_setup)
torch.library.register_autograd("landmark::moe_combine", _combine_vjp, setup_context=_combine_setup)

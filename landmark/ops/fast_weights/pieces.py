"""What is between the matrix products of a memory that learns, each with what its gradient needs: in C for float32 on
the processor, otherwise in torch."""

from __future__ import annotations

import math
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..native import Source

Act = Literal["gelu", "gelu_tanh"]
GELU: dict[Act, str] = {"gelu": "none", "gelu_tanh": "tanh"}
SOURCE = Source(Path(__file__).with_name("pieces.c"))
ONE_THREAD = 2**15  # elements that a second thread would not finish any sooner
_P, _I, _N = c_void_p, c_int64, c_int
_SIGNATURES = {
    "gelu_erf": (_P, _P, _P, _P, _I, _N),
    "gelu_tanh": (_P, _P, _P, _P, _I, _N),
    "loss_gradient": (_P, _P, _P, _P, _P, _P, _I, _I, _I, c_float, _N),
    "loss_gradient_backward": (_P, _P, _P, _P, _P, _P, _P, _P, _P, _I, _I, _I, _N),
}


@cache
def _kernel(name: str) -> Any:
    return SOURCE.function(name, *_SIGNATURES[name])


def _native(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # compilers do not see what the kernels write
    return x.is_cpu and x.dtype == torch.float32 and x.numel() > 0 and SOURCE.why_not() is None


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > ONE_THREAD else 1


def gelu(x: Tensor, act: Act) -> Tensor:
    return F.gelu(x, approximate=GELU[act])


def gelu_slopes(x: Tensor, act: Act, second: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """gelu(x), its derivative, and its second one if asked for."""
    if _native(x):
        x = x.contiguous()
        y, d, dd = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x) if second else None
        _kernel("gelu_tanh" if act == "gelu_tanh" else "gelu_erf")(
            x.data_ptr(), y.data_ptr(), d.data_ptr(), None if dd is None else dd.data_ptr(), x.numel(), _threads(x)
        )
        return y, d, dd
    if act == "gelu":
        phi, density = (1 + torch.erf(x / math.sqrt(2))) / 2, torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return x * phi, phi + x * density, density * (2 - x * x) if second else None
    c, a = math.sqrt(2 / math.pi), 0.044715
    u, slope = c * (x + a * x**3), c * (1 + 3 * a * x * x)
    t, rest = torch.tanh(u), torch.cosh(u) ** -2
    d = (1 + t) / 2 + x * rest * slope / 2
    return x * (1 + t) / 2, d, rest * (slope + 3 * a * c * x * x - x * t * slope**2) if second else None


class Slope(NamedTuple):
    """The gradient g of the loss at the output z of an MLP, and what its own gradient needs."""

    g: Tensor
    hat: Tensor | None = None
    rate: Tensor | None = None


def loss_gradient(z: Tensor, goal: Tensor, gain: Tensor | None, eps: float) -> Slope:
    """z - goal, or with a norm: the gradient at z of a loss whose gradient at the normalised z^ is gain z^ + goal.

    z, goal [N, n, d]; gain [N, 1, d].
    """
    if gain is None:
        return Slope(z - goal)
    if _native(z):
        z, goal, gain = z.contiguous(), goal.contiguous(), gain.contiguous()
        g, hat, rate = torch.empty_like(z), torch.empty_like(z), z.new_empty(*z.shape[:2], 1)
        _kernel("loss_gradient")(
            z.data_ptr(), goal.data_ptr(), gain.data_ptr(), g.data_ptr(), hat.data_ptr(), rate.data_ptr(),
            z.shape[0] * z.shape[1], z.shape[2], z.shape[1], eps, _threads(z),
        )  # fmt: skip
        return Slope(g, hat, rate)
    centred = z - z.mean(-1, keepdim=True)
    rate = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    hat = centred * rate
    a = torch.addcmul(goal, gain, hat)
    return Slope(rate * _straight(a, hat), hat, rate)


def loss_gradient_backward(
    y: Tensor, slope: Slope, goal: Tensor, gain: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients with respect to z, goal and gain [N, 1, d], from y = d loss / d g."""
    g, hat, rate = slope
    if gain is None:
        return y, -y, None
    assert hat is not None and rate is not None
    if _native(y):
        y, goal, gain = y.contiguous(), goal.contiguous(), gain.contiguous()
        dz, dgoal, dgain = torch.empty_like(y), torch.empty_like(y), torch.empty_like(y)
        _kernel("loss_gradient_backward")(
            y.data_ptr(), g.data_ptr(), hat.data_ptr(), rate.data_ptr(), goal.data_ptr(), gain.data_ptr(),
            dz.data_ptr(), dgoal.data_ptr(), dgain.data_ptr(), y.shape[0] * y.shape[1], y.shape[2], y.shape[1],
            _threads(y),
        )  # fmt: skip
        return dz, dgoal, dgain.sum(1, keepdim=True)
    a = torch.addcmul(goal, gain, hat)
    da = rate * _straight(y, hat)
    dhat = gain * da - rate * ((a * hat).mean(-1, keepdim=True) * y + (y * hat).mean(-1, keepdim=True) * a)
    dz = rate * (_straight(dhat, hat) - hat * (y * g).mean(-1, keepdim=True))
    return dz, da, (da * hat).sum(1, keepdim=True)


def _straight(x: Tensor, hat: Tensor) -> Tensor:
    """x without its parts along the ones and along z^, as a LayerNorm's gradient has it."""
    return x - x.mean(-1, keepdim=True) - hat * (x * hat).mean(-1, keepdim=True)

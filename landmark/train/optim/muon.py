"""Muon (Jordan et al. 2024): momentum, made orthogonal; for hidden matrices only, AdamW takes the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ...ops import products
from ...parallel.data import is_shard
from .adamw import AdamW
from .base import Named, OptimizerConfig, Simple

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose iteration brings singular values near 1


class Muon(Simple):
    """m = mu m + g;  u = NewtonSchulz(g + mu m);  p -= lr (0.2 sqrt(max(rows, columns)) u + decay p).

    The factor gives updates AdamW's usual RMS, so that learning rate and decay carry over (Liu et al. 2025, eq. 4).
    Embeddings, head, norms and biases get AdamW with the same learning rate, by `betas` and `eps`.
    """

    class Config(OptimizerConfig):
        lr: float = 3e-3
        weight_decay: float = 0.1
        momentum: float = 0.95
        nesterov: bool = True
        iterations: int = 5
        betas: tuple[float, float] = (0.9, 0.95)
        eps: float = 1e-8

        def check(self) -> None:
            super().check()
            if not 0.0 <= self.momentum < 1.0:
                raise ValueError(f"Muon.momentum is {self.momentum!r}; it must be in [0, 1)")

        def build(self, parameters: list[Named]) -> list[Optimizer]:
            hidden = [p for p in parameters if p.role == "matrix"]
            rest = [p for p in parameters if p.role != "matrix"]
            options = {"momentum": self.momentum, "nesterov": self.nesterov, "iterations": self.iterations}
            adamw = AdamW.Config(lr=self.lr, weight_decay=self.weight_decay, betas=self.betas, eps=self.eps)
            return ([Muon(self.groups(hidden, **options))] if hidden else []) + adamw.build(rest)

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(p)}

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        m = state["m"].mul_(group["momentum"]).add_(grad)
        direction = grad + group["momentum"] * m if group["nesterov"] else m
        u = orthogonalise(direction, group["iterations"])
        rate = group["lr"] * 0.2 * max(p.shape[-2:]) ** 0.5
        p.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(u, alpha=-rate)


def orthogonalise(x: Tensor, iterations: int) -> Tensor:
    """About U V^T of x = U S V^T, [..., rows, columns], by Newton-Schulz; in bfloat16 unless x is float64 or the
    processor would have to emulate it.

    A sharded matrix is gathered first: its rows are not independent here.
    """
    if is_shard(x):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(orthogonalise(x.full_tensor(), iterations), x.device_mesh, x.placements)
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    few = torch.float32 if products.EMULATED and x.device.type == "cpu" else torch.bfloat16
    y = (x.mT if tall else x).to(torch.float64 if x.dtype == torch.float64 else few)
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if tall else y).to(x.dtype)

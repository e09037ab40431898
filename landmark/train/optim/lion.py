"""Lion (Chen et al. 2023, algorithm 2): the sign of an interpolated momentum; one state a parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .base import Named, OptimizerConfig, Simple


class Lion(Simple):
    """u = sign(b1 m + (1 - b1) g);  p -= lr (u + decay p);  m = b2 m + (1 - b2) g."""

    class Config(OptimizerConfig):
        lr: float = 1e-4
        weight_decay: float = 1.0
        betas: tuple[float, float] = (0.9, 0.99)

        def build(self, parameters: list[Named]) -> list[Optimizer]:
            return [Lion(self.groups(parameters, betas=self.betas))] if parameters else []

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(p)}

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        m, (b1, b2), lr = state["m"], group["betas"], group["lr"]
        direction = torch.lerp(grad, m, b1).sign_()
        p.mul_(1.0 - lr * group["weight_decay"]).add_(direction, alpha=-lr)
        m.lerp_(grad, 1.0 - b2)

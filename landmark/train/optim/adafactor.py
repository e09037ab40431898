"""Adafactor (Shazeer & Stern 2018, algorithms 4 and 5): second moments of a matrix kept as a row and a column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .base import Named, OptimizerConfig, Simple


class Adafactor(Simple):
    """Without momentum. `lr` is the paper's relative step rho, multiplied by max(eps2, RMS(p)).

    The paper's rho_t = min(1e-2, 1 / sqrt(t)) is `lr = 1e-2` with the schedule `InverseSqrt(warmup=10_000)` after it.
    """

    class Config(OptimizerConfig):
        lr: float = 1e-2
        decay_rate: float = 0.8  # beta2_t = 1 - t^-decay_rate
        eps1: float = 1e-30
        eps2: float = 1e-3
        clip: float = 1.0  # the largest RMS of an update

        def build(self, parameters: list[Named]) -> list[Optimizer]:
            options = {"decay_rate": self.decay_rate, "eps1": self.eps1, "eps2": self.eps2, "clip": self.clip}
            return [Adafactor(self.groups(parameters, **options))] if parameters else []

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        step = torch.zeros(())  # on the CPU, where its value is needed
        if p.dim() < 2:
            return {"step": step, "second": torch.zeros_like(p)}
        return {"step": step, "row": torch.zeros_like(p.mean(-1)), "column": torch.zeros_like(p.mean(-2))}

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        state["step"] += 1
        keep = 1.0 - state["step"].item() ** -group["decay_rate"]
        square = grad.square().add_(group["eps1"])
        if p.dim() < 2:
            state["second"].lerp_(square, 1.0 - keep)
            update = grad * state["second"].rsqrt()
        else:
            row, column = state["row"], state["column"]
            row.lerp_(square.mean(-1), 1.0 - keep)
            column.lerp_(square.mean(-2), 1.0 - keep)
            scale = (row / row.mean(-1, keepdim=True)).rsqrt_()
            update = grad * scale[..., None] * column.rsqrt()[..., None, :]
        rms = update.square().mean().sqrt()
        size = p.square().mean().sqrt().clamp_min(group["eps2"])
        p.mul_(1.0 - group["lr"] * group["weight_decay"])
        p.sub_(update * (group["lr"] * size / (rms / group["clip"]).clamp_min(1.0)))

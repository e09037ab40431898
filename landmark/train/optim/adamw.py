"""AdamW (Loshchilov & Hutter 2019): torch's fused kernel, one pass over memory on CPU and GPU alike."""

from __future__ import annotations

import torch
from torch.optim.optimizer import Optimizer

from .base import Named, OptimizerConfig


class AdamW(torch.optim.AdamW):
    """torch's AdamW with its state allocated before the first update, so that a checkpoint has a place to go."""

    class Config(OptimizerConfig):
        lr: float = 1e-3
        weight_decay: float = 0.1
        betas: tuple[float, float] = (0.9, 0.95)
        eps: float = 1e-8

        def build(self, parameters: list[Named]) -> list[Optimizer]:
            return [AdamW(self, parameters)] if parameters else []

    def __init__(self, cfg: Config, parameters: list[Named]) -> None:
        super().__init__(cfg.groups(parameters), lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
        for p in parameters:
            self.state[p.tensor] = {
                "step": torch.zeros((), device=p.tensor.device),
                "exp_avg": torch.zeros_like(p.tensor),
                "exp_avg_sq": torch.zeros_like(p.tensor),
            }

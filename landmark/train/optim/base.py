"""What an optimiser's config is, and which role each parameter of a model plays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ...config import Config
from ...nn.embedding import Head

Role = Literal["matrix", "embedding", "head", "vector"]


@dataclass(frozen=True)
class Named:
    """A parameter as an optimiser sees it: `tensor` is the parameter itself, or its float32 master."""

    name: str
    tensor: Tensor
    role: Role

    @property
    def decays(self) -> bool:
        """Weight decay pulls at matrices and the head, not at embeddings, norms and biases."""
        return self.role in ("matrix", "head")


def roles(model: nn.Module) -> dict[str, Role]:
    """The role of every trainable parameter by name; a tied one counts once, as the embedding that it is."""
    found: dict[nn.Parameter, Role] = {}
    for module in model.modules():
        heads = {module.linear} if isinstance(module, Head) else set()
        for sub in (module, *heads):
            for parameter in sub.parameters(recurse=False) if sub is not None else ():
                if isinstance(sub, nn.Embedding):
                    found[parameter] = "embedding"
                elif sub in heads:
                    found[parameter] = "head"
                else:
                    found.setdefault(parameter, "matrix" if parameter.dim() > 1 else "vector")
    return {name: found[p] for name, p in model.named_parameters() if p.requires_grad}


class OptimizerConfig(Config, ABC, abstract=True):
    """`lr` is the peak learning rate, which the schedule's factor multiplies; `weight_decay` is decoupled."""

    lr: float
    weight_decay: float = 0.0

    def check(self) -> None:
        super().check()
        for name in ("lr", "eps"):
            value = getattr(self, name, 1.0)
            if not 0.0 < value < 1e3:
                raise ValueError(f"{self.type_name}.{name} is {value!r}; it must be positive (and sane)")
        if not 0.0 <= self.weight_decay < 1e3:
            raise ValueError(f"{self.type_name}.weight_decay is {self.weight_decay!r}; it must be 0 or more")
        betas: tuple[float, ...] = getattr(self, "betas", ())
        if any(not 0.0 <= beta < 1.0 for beta in betas) or len(betas) not in (0, 2):
            raise ValueError(f"{self.type_name}.betas is {betas!r}; it must be two numbers in [0, 1)")

    @abstractmethod
    def build(self, parameters: list[Named]) -> list[Optimizer]:
        """The optimisers that together update `parameters`, with their state allocated (zeros)."""

    def groups(self, parameters: Iterable[Named], **options: Any) -> list[dict[str, Any]]:
        """Two parameter groups, one with weight decay and one without; empty ones are left out."""
        groups = []
        parameters = list(parameters)
        for decays in (True, False):
            members = [p.tensor for p in parameters if p.decays is decays]
            decay = self.weight_decay if decays else 0.0
            if members:
                groups.append({"params": members, "lr": self.lr, "peak": self.lr, "weight_decay": decay, **options})
        return groups


class Simple(Optimizer):
    """A torch optimiser whose state is allocated at once and whose update of one tensor is `update`."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = self.new_state(p)

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        """State of a parameter before the first update."""
        raise NotImplementedError

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Change `p` and `state` in place."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)

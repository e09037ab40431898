"""What every model has in common: how it comes to life, and where it came from."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import Config, ModelConfig
from ..nn.moe import GroupedLinear, MoE
from ..nn.residual import Normed, Parallel, Sublayer


@dataclass(frozen=True)
class Origin:
    """A published form of a model: the contents of its config.json, and the directory that it was read from."""

    hf: Mapping[str, Any]
    directory: Path | None = None


class Model(nn.Module):
    """A module that knows its config, and its published form if it has one."""

    cfg: ModelConfig
    origin: Origin | None = None

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def _first(self) -> nn.Parameter:
        first = _first_parameter(self)
        assert first is not None, "a model has parameters"
        return first


def _first_parameter(module: nn.Module) -> nn.Parameter | None:
    """The first of `module.parameters()`, in a tenth of the time: it is asked for with each token."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        if child is not None and (found := _first_parameter(child)) is not None:
            return found
    return None


class Init(Config):
    """Weights ~ N(0, std^2), biases 0; matrices that end a residual sublayer are scaled by 1 / sqrt(number of
    sublayers) if `residual` (GPT-2, Radford et al. 2019, sec. 2.3).

    `std` None: a matrix has the variance 1 / (number of its inputs) (LeCun et al. 1998). `embedding` is the deviation
    of embedding tables, where it is not `std`.
    """

    std: float | None = 0.02
    embedding: float | None = None
    residual: bool = True

    def check(self) -> None:
        super().check()
        if self.std is None and self.embedding is None:
            raise ValueError("Init.std is None, which says nothing of embedding tables; give Init.embedding a number")

    def deviation(self, module: nn.Linear | nn.Embedding | GroupedLinear) -> float:
        """The standard deviation of a module's weight."""
        if isinstance(module, nn.Embedding) and self.embedding is not None:
            return self.embedding
        return module.weight.shape[-1] ** -0.5 if self.std is None else self.std


M = TypeVar("M", bound=nn.Module)


class Unfilled(TorchFunctionMode):
    """Modules do not fill their parameters as they are made: on the meta device there is nothing to fill, and to ask
    for it makes torch import a second's worth of modules."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fills = func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
        return kwargs["tensor"] if fills else func(*args, **kwargs)


def materialise(make: Callable[[], M], init: Init) -> M:
    """Build without allocating, then allocate and initialise - unless the caller works on the meta device.

    Raises ValueError for a model that is larger than this machine's memory.
    """
    target = torch.get_default_device()
    with torch.device("meta"), Unfilled():
        model = make()
    if target.type == "meta":
        return model
    size = sum(p.nbytes for p in model.parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if target.type == "cpu" and size > memory:
        raise ValueError(
            f"a model of {size / 1e9:,.0f} GB does not fit this machine's {memory / 1e9:,.0f} GB; choose smaller sizes"
        )
    model.to_empty(device=target)
    init_weights(model, init)
    return model


@runtime_checkable
class Staged(Protocol):
    """A module that begins otherwise near the input of a model than near its output."""

    def reset_at(self, layer: int, layers: int) -> None:
        """Initialise what is in it, as number `layer` of the `layers` of its kind."""


@torch.no_grad()
def init_weights(model: nn.Module, init: Init) -> None:
    """Initialise every parameter in place."""
    ends = residual_ends(model)
    depth = max(1, len(ends))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | GroupedLinear):
            scale = 1 / math.sqrt(depth) if init.residual and module in ends else 1.0
            nn.init.normal_(module.weight, std=init.deviation(module) * scale)
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                nn.init.zeros_(bias)
        else:
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
            elif next(module.parameters(recurse=False), None) is not None and not isinstance(module, Staged):
                raise TypeError(f"{type(module).__name__} has parameters but no reset_parameters()")
    kinds: dict[type, list[Staged]] = {}
    for module in model.modules():
        if isinstance(module, Staged):
            kinds.setdefault(type(module), []).append(module)
    for same in kinds.values():
        for layer, staged in enumerate(same):
            staged.reset_at(layer, len(same))


def residual_ends(model: nn.Module) -> set[nn.Module]:
    """The matrices whose output is added to the residual stream: `out` and `down` of every sublayer's function."""
    functions = [m.fn for m in model.modules() if isinstance(m, Sublayer) and not isinstance(m.fn, Normed)]
    for module in model.modules():
        if isinstance(module, Parallel):
            functions += [fn.fn if isinstance(fn, Normed) else fn for fn in module.fns.values()]
    functions += [
        part for fn in functions if isinstance(fn, MoE) for part in (fn.experts, fn.shared) if part is not None
    ]
    ends = (getattr(fn, name, None) for fn in functions for name in ("out", "down"))
    return {end for end in ends if isinstance(end, nn.Linear | GroupedLinear)}


def kind(model: nn.Module) -> str:
    """What it is, with an article: "an Encoder"."""
    name = type(model).__name__
    return f"a{'n' if name[0] in 'AEIO' else ''} {name}"

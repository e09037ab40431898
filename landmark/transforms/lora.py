"""LoRA (Hu et al. 2021): low-rank changes of a built model's linear maps, beside them or merged into them.

poet = read_adapter("poet", model)                       # PEFT's format, of any family
adapters = attach(model, {"poet": poet, "clerk": read_adapter("clerk", model)})
with adapters.use("poet"): model(tokens)                 # or rows of one batch through different ones: adapters.rows
merge(model, poet)                                       # W + scale B A, for good
new = fresh(model, rank=8, targets=("q", "v"))           # A random, B zero: to be trained
write_adapter(taken(model, "poet"), model, "poet2")      # as it is now
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..config import nearest
from ..models.base import Model
from ..models.decoder import Decoder
from ..nn.codes import CodedExperts
from ..nn.linear import KEPT, GroupedLinear, Linear
from ..nn.lora import Adapters, Factors, LoRA, linear_maps
from ..weights.adapter import Adapter, read_adapter, write_adapter
from ..weights.low_rank import LowRank


def attach(
    model: Model, adapters: Mapping[str, Adapter], *, to: Adapters | None = None, dtype: torch.dtype | None = None
) -> Adapters:
    """Adapters beside the linear maps of a model, from which what is returned chooses; at first, none is chosen. `to`:
    those that the model has already, which these join.

    Maps may be coded (int8, int4) or ternary. Factors are kept, and what they add is computed, in `dtype`, by default
    the model's; they take gradients once `requires_grad_` says so. Raises ValueError for maps that cannot have one:
    stacks of experts, and those whose weight other layers read (a head, what latent attention absorbs); `merge` takes
    these too.
    """
    found = {name: module for name, module, _ in linear_maps(model)}
    chooser = to or Adapters()
    for title, adapter in adapters.items():
        if title in chooser.names:
            raise ValueError(f"the model has an adapter {title!r} already; give each a name of its own")
        for name in adapter.factors:
            if name not in found:
                raise ValueError(
                    f"the adapter {title!r} changes {name!r}, which this model lacks{nearest(name, found)}"
                )
            if (reason := why_not(name, found[name])) is not None:
                raise ValueError(f"the adapter {title!r} changes {name!r}, which {reason}; merge it into the weights")
    where: Any = {"device": model.device, "dtype": dtype or model.dtype}
    with chooser.use(None):
        for title, adapter in adapters.items():
            number = str(len(chooser.names))
            chooser.names.append(title)
            for name, low in adapter.factors.items():
                if name not in chooser.places:
                    parent, _, last = name.rpartition(".")
                    lora = LoRA(found[name], chooser).train(found[name].training)
                    chooser.places[name] = model.get_submodule(parent), last, lora
                lora = chooser.places[name][2]
                factors = Factors(low.right.to(**where, copy=True), low.left.to(**where, copy=True), low.scale)
                lora.factors[number] = factors.requires_grad_(False).train(lora.training)
    return chooser


def why_not(name: str, module: nn.Module) -> str | None:
    """None if a linear map can have adapters beside it, else why not."""
    if isinstance(module, GroupedLinear | CodedExperts):
        return "is a stack of experts"
    if any(f".{name}".endswith(f".{end}") for end in (*KEPT, "head.linear")):
        return "other layers read"
    return None


@torch.inference_mode()
def check_rows(model: Decoder, adapters: Adapters) -> None:
    """Raise ValueError for a model whose adapted maps read something else than its tokens one by one (such as learned
    tokens), so that rows of a batch cannot differ in their adapters."""
    for count in (2, 3):  # what is no row a token differs from one of them
        tokens = torch.zeros(count, 1, dtype=torch.long, device=model.device)
        for number in range(len(adapters.names)):
            with adapters.rows([(number, count - 1), (-1, 1)]):
                model.hidden(tokens, state=model.new_state(count, 1))


def taken(adapters: Adapters, title: str) -> Adapter:
    """An attached adapter as it is now; its tensors are the model's."""
    number, factors = str(adapters.number(title)), {}
    for name, (_, _, lora) in adapters.places.items():
        if number in lora.factors:
            own: Any = lora.factors[number]
            factors[name] = LowRank(own.B.detach(), own.A.detach(), own.scale)
    return Adapter(factors)


@torch.no_grad()
def merge(model: Model, adapter: Adapter) -> None:
    """W + scale B A for every map that the adapter changes, in place; computed in float32, kept in W's dtype.

    Raises ValueError for coded weights, which would be rounded anew: merge before they are coded.
    """
    found = {name: module for name, module, _ in linear_maps(model)}
    for name in adapter.factors:
        module = found.get(name)
        if type(module) is not Linear and type(module) is not GroupedLinear:
            what = "this model lacks" if module is None else f"is a {type(module).__name__} and cannot take it up"
            raise ValueError(f"the adapter changes {name!r}, which {what}; merge it into the model it was made for")
    for name, low in adapter.factors.items():
        module = found[name]
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged = weight.to(wide) + low.dense(wide).to(weight.device)
        module.weight = nn.Parameter(merged.to(weight.dtype), requires_grad=weight.requires_grad)


def fresh(model: Model, rank: int = 8, alpha: float = 16.0, targets: Sequence[str] = ("q", "v")) -> Adapter:
    """An adapter that changes nothing yet: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0 (sec. 4.1). `targets` are ends of
    dotted names of linear maps ("q", "ffn.fn.up"); raises ValueError where none has such a name."""
    if rank < 1:
        raise ValueError(f"the rank is {rank}; it must be at least 1")
    maps = {name: shape for name, module, shape in linear_maps(model) if why_not(name, module) is None}
    factors = {}
    for end in targets:
        chosen = [name for name in maps if f".{name}".endswith(f".{end}")]
        if not chosen:
            raise ValueError(f"no linear map is called {end!r}{nearest(end, {n.rpartition('.')[2] for n in maps})}")
        for name in chosen:
            out, width = maps[name]
            A = (torch.rand(rank, width) * 2 - 1) / math.sqrt(width)
            factors[name] = LowRank(torch.zeros(out, rank), A, alpha / rank)
    return Adapter(factors)


__all__ = [
    "Adapter",
    "Adapters",
    "attach",
    "check_rows",
    "fresh",
    "merge",
    "read_adapter",
    "taken",
    "write_adapter",
]

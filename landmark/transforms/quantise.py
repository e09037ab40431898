"""Weights rounded to 4 or 8 bits in groups of 32, each to its nearest code: no data needed, no training after.

What meets them may be rounded too, as it comes (`a8`: to 8 bits in groups of 32): eight texts at once and long prompts
are faster then, at a little accuracy. bfloat16 in 11 bits loses nothing: it is read sooner, no more.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Config, nearest
from ..models.backbone import Backbone
from ..models.base import Model
from ..nn.codes import CodedLinear, Codes
from ..nn.embedding import Embedding, Head
from ..nn.linear import KEPT
from ..ops.quant.codes import Bits
from .rebuild import replace_configs


class Way(NamedTuple):
    bits: Bits  # of the layers' matrices
    outer: Bits  # of embedding table and head
    round_x: bool = False


_PLAIN = {"int8": Way(8, 8), "int4": Way(4, 8), "int4-all": Way(4, 4)}
WAYS = _PLAIN | {f"{name}-a8": way._replace(round_x=True) for name, way in _PLAIN.items()} | {"bf16-11": Way(11, 11)}


@torch.no_grad()
def quantise(
    model: Model, bits: Bits, *, outer: Bits | None = 8, skip: tuple[str, ...] = KEPT, round_x: bool = False
) -> Model:
    """A new model in eval mode with coded weights; what is not coded it shares with the old one.

    `bits` for the linear maps of its layers and for its experts (which stay as they are where 11 are asked for),
    `outer` for the table of tokens and the head (None: as they are); `skip` names maps that stay, or the ends of their
    dotted names; with `round_x` coded maps round what they multiply, to 8 bits. Raises ValueError where the linear maps
    are something else already, and for 11 bits of other numbers than bfloat16.
    """
    new = _coded(model, bits, outer, skip, round_x)
    weights: dict[str, Tensor] = dict(model.state_dict())
    for name, module in new.named_modules():
        if isinstance(module, Codes):
            weight = weights.pop(f"{name}.weight")
            codes, side = module.encoded(weight)
            weights |= {f"{name}.codes": codes, f"{name}.side": side, f"{name}.unit": weight.new_ones(())}
    new.load_state_dict(weights, assign=True)
    new.origin = model.origin
    return new.eval()


def _coded(model: Model, bits: Bits, outer: Bits | None, skip: tuple[str, ...], round_x: bool) -> Model:
    """The new model, without weights."""

    def coded(config: Config) -> Config:
        if isinstance(config, Backbone.Config):
            if config.linear is not None:
                raise ValueError(f"the linear maps of this model are {config.linear.type_name} already")
            return dataclasses.replace(config, linear=CodedLinear.Config(bits=bits, skip=skip, round_x=round_x))
        if isinstance(config, Head.Config):
            return dataclasses.replace(config, bits=outer, round_x=round_x and outer is not None)
        return dataclasses.replace(config, bits=outer) if isinstance(config, Embedding.Config) else config

    with torch.device("meta"):
        new = replace_configs(model.cfg, coded).build()
    assert isinstance(new, Model)
    return new


def quantised(model: Model, way: str) -> Model:
    """`quantise` as one of `WAYS` says. Raises ValueError with the nearest name."""
    if way not in WAYS:
        raise ValueError(f"there is no way {way!r} to quantise{nearest(way, WAYS)}; choose one of {', '.join(WAYS)}")
    bits, outer, round_x = WAYS[way]
    return quantise(model, bits, outer=outer, round_x=round_x)

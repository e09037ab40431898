"""Decoding state of mixers whose memory is a network: its matrices, for every slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import Config
from ..ops.fast_weights import Matrices, Memory
from .cache import SlotState

PARTS = ("base", "now", "momentum")


def head_width(config: Config, heads: int, head_dim: int | None, dim: int) -> int:
    """`head_dim`, or an equal share of the width. Raises ValueError if there is none."""
    if head_dim is None and dim % heads:
        raise ValueError(
            f"{config.type_name}.heads is {heads}, which does not divide the width {dim}; choose a divisor"
        )
    return head_dim or dim // heads


def room(
    matrices: Sequence[Tensor], slots: int, dtype: torch.dtype, device: torch.device, parts: tuple[str, ...] = PARTS
) -> dict[str, Tensor]:
    """Tensors [slots, heads, in, out] for every matrix [heads, in, out] and part, in at least float32: many small
    steps add up there."""
    dtype = torch.promote_types(dtype, torch.float32)
    return {
        f"{part}{n}": torch.zeros(slots, *w.shape, dtype=dtype, device=device)
        for part in parts
        for n, w in enumerate(matrices)
    }


def memory_of(state: SlotState, parts: tuple[str, ...] = PARTS) -> Memory:
    """What each slot's memory holds."""
    count = sum(name.startswith("base") for name in state.tensors)
    held = {part: tuple(state.tensors[f"{part}{n}"] for n in range(count)) for part in parts}
    return Memory(held["base"], held.get("now", held["base"]), held["momentum"])


def merged(new: Tensor, start: Memory, memory: Memory) -> Memory:
    """`start` for slots that are `new` [slots, 1, 1, 1], `memory` for the others."""
    start = start.to(memory.base[0].dtype)
    return Memory(*(
        tuple(torch.where(new, a, b) for a, b in zip(first, here, strict=True))
        for first, here in zip(start, memory, strict=True)
    ))  # fmt: skip


def put(state: SlotState, memory: Memory, parts: tuple[str, ...] = PARTS) -> None:
    """Put what is known after a call into the state."""
    held: dict[str, Matrices] = memory._asdict()
    for part in parts:
        for n, w in enumerate(held[part]):
            state.tensors[f"{part}{n}"] = w.contiguous()

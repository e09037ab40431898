"""The processes of a run: one alone, or as many as torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..weights.checkpoint import as_device


@dataclass(frozen=True)
class World:
    """This process among `size`, and the device that it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        result: list[float] = total.tolist()
        return result

    def any(self, value: bool) -> bool:
        """Whether it is true in any process."""
        return self.sum([value])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def world(device: torch.device | str | None = None) -> Iterator[World]:
    """Joins the process group that torchrun describes in the environment; without one, a world of this process alone.

    `device` None is the accelerator of this process's local rank if there is one, else the CPU. A process group that
    stands already is used and left standing.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    device = as_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    started = False
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        started = True
    try:
        if dist.is_initialized():
            yield World(dist.get_rank(), dist.get_world_size(), device)
        else:
            yield World(0, 1, device)
    finally:
        if started:
            dist.destroy_process_group()

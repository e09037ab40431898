"""Data parallelism as a transform of a built module: replicas (DDP) or shards (FSDP2) of what torchrun started.

Model code knows nothing of it. What is wrapped is the whole training step: its forward is the one that hooks see.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeGuard

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..nn.residual import Block
from .world import World

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Kind = Literal["ddp", "fsdp"]


def parameter_dtype(dtype: torch.dtype, kind: Kind, world: World) -> torch.dtype:
    """What parameters are stored in when training in `dtype`: FSDP keeps float32 shards, and gathers in `dtype`."""
    return torch.float32 if kind == "fsdp" and world.size > 1 else dtype


def wrap(step: nn.Module, kind: Kind, dtype: torch.dtype, world: World) -> nn.Module:
    """The step, ready for `world`; its parameters become those of the first process. Gradients are averaged."""
    if world.size == 1:
        return step
    if kind == "ddp":
        return DistributedDataParallel(step, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for tensor in (*step.parameters(), *step.buffers()):
        dist.broadcast(tensor.data, 0)
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in list(step.modules()):
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(step, mesh=mesh, mp_policy=policy)
    return step


@contextmanager
def synchronised(step: nn.Module, now: bool) -> Iterator[None]:
    """Whether gradients are exchanged in the backward passes of this block, or only summed up here."""
    if isinstance(step, DistributedDataParallel) and not now:
        with step.no_sync():
            yield
    else:
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None and isinstance(step, fsdp.FSDPModule):
            step.set_requires_gradient_sync(now)
        yield


def is_shard(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, without loading the second's worth of modules that make them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    return any(is_shard(p) for p in model.parameters())


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with every shard gathered, on the CPU where it was gathered. All processes must call."""
    return {
        name: tensor.full_tensor().cpu() if is_shard(tensor) else tensor
        for name, tensor in model.state_dict().items()
    }

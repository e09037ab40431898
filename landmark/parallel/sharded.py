"""Sharded tensors on disk: every process writes its own part as safetensors, any number of them reads it back.

torch.distributed.checkpoint with its safetensors layout: where a part lies in the whole is in the file's header.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor


def save(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """All processes call with the same names; tensors that are not sharded are written once."""
    dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True))


def load(directory: Path, like: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """What `directory` holds under `prefix`, in the dtypes in which it was saved: sharded as the tensor of its name in
    `like` is, else whole on the CPU."""
    reader = HuggingFaceStorageReader(str(directory))
    tensors: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if not name.startswith(prefix):
            continue
        assert isinstance(entry, TensorStorageMetadata)
        twin = like.get(name)
        if isinstance(twin, DTensor):
            tensors[name] = torch.empty_like(twin, dtype=entry.properties.dtype)
        else:
            tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a process alone is fine
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return tensors

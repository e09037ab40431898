"""What training may do to the blocks of a model, and undoes when it is over: recomputation and compilation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..nn.residual import Block


@contextmanager
def transformed(model: nn.Module, *, recompute: bool, compile: bool) -> Iterator[None]:
    """With `recompute`, a block keeps its input only and computes the rest again in backward (Chen et al. 2016); with
    `compile`, torch.compile fuses what is between our own kernels, once for each kind of block.

    Weights, their names and the results stay the same. In eval mode blocks are as they were.
    """
    blocks = [m for m in model.modules() if isinstance(m, Block)] if recompute or compile else []
    for block in blocks:
        block.forward = _forward(block, block.forward, recompute, compile)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def check_compiler(device: torch.device) -> None:
    """Raises ValueError where torch.compile has no compiler for the processor's code."""
    cxx = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(cxx) is None:
        raise ValueError(f"compile needs a C++ compiler, and there is no {cxx}; install it, or set compile to false")


def _forward(block: Block, plain: Callable[..., Any], recompute: bool, compile: bool) -> Callable[..., Any]:
    def recomputed(*args: Any) -> Any:
        return checkpoint(plain, *args, use_reentrant=False)

    train = recomputed if recompute else torch.compile(plain) if compile else plain
    return lambda *args: train(*args) if block.training else plain(*args)

"""Landmark: the landmark papers of the LLM era as one working system."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .train import train as train
    from .weights.checkpoint import build as build
    from .weights.checkpoint import load as load
    from .weights.checkpoint import save as save

if "OMP_WAIT_POLICY" not in os.environ:
    # OpenMP threads that wait for one which is not running spin, for milliseconds by default. Read as torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    # Both keep kernels made for a number of rows, 0.4 MB each. Texts have all lengths, and 1024 of each are too many.
    os.environ.setdefault(_cache, "256")

__version__ = "0.1.0"

_WHERE = {"load": "weights.checkpoint", "save": "weights.checkpoint", "build": "weights.checkpoint"}
__all__ = ["build", "load", "save", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # a package that can be called like its function
        return import_module(".train", __name__)
    if name not in _WHERE:
        raise AttributeError(f"module 'landmark' has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)

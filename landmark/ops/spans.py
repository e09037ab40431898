"""The sequences of a batch as kernels and gathers read them, made once for all the layers that see it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ctx import Bounds


def spans(bounds: Bounds) -> Tensor:
    """[sequences, 2] int64 on the processor: the first token of each sequence among rows * width, and its length."""
    return bounds.memo("spans", lambda: torch.tensor(bounds.sequences, dtype=torch.long).view(-1, 2))


def covers(bounds: Bounds) -> bool:
    """Whether every token lies in a sequence."""
    return bounds.memo("covers", lambda: sum(n for _, n in bounds.sequences) == bounds.rows * bounds.width)

"""Figures of an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """Figures since the engine was made; from `running` on, of this moment."""

    steps: int = 0
    seconds: float = 0.0  # in steps
    computed_tokens: int = 0
    cached_tokens: int = 0  # of prompts, found and not computed
    new_tokens: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    preempted: int = 0
    crashes: int = 0
    proposed: int = 0  # tokens that were guessed and compared with what was drawn
    kept: int = 0  # those of them that were right
    running: int = 0
    waiting: int = 0
    used: float = 0.0  # share of the blocks (slots, for models without) that sequences hold

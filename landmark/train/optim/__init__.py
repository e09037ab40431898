"""Optimisers: each a small file with its paper's update, and a config that says which parameters it gets and how."""

from __future__ import annotations

from .adafactor import Adafactor
from .adamw import AdamW
from .base import OptimizerConfig
from .lion import Lion
from .muon import Muon
from .updater import Updater

__all__ = ["Adafactor", "AdamW", "Lion", "Muon", "OptimizerConfig", "Updater"]

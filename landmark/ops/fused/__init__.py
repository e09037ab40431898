"""Elementwise and row-wise operations of a Transformer block, each one pass over memory."""

from __future__ import annotations

from landmark.ops.fused import reference
from landmark.ops.fused.reference import glu, rms_norm, rotary

__all__ = ["glu", "reference", "rms_norm", "rotary"]

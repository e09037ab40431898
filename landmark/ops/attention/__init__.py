"""Scaled dot-product attention over ragged batches: softmax(q k^T * scale) v."""

from .dispatch import attention, visible, why_not
from .reference import reference

__all__ = ["attention", "reference", "visible", "why_not"]

"""Cross-entropy of a linear head."""

from __future__ import annotations

from landmark.ops.loss import reference
from landmark.ops.loss.reference import CrossEntropy, cross_entropy, token_logprobs

__all__ = ["CrossEntropy", "cross_entropy", "reference", "token_logprobs"]

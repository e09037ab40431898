"""What a run can learn: each objective as a config that knows its text, its tokenizer and its model."""

from __future__ import annotations

from .ahead import MultiToken
from .base import ObjectiveConfig
from .causal import CausalLM
from .choices import MultipleChoice
from .generative import GenerativeFineTuning
from .masked import MaskedLM
from .seq2seq import Seq2Seq
from .sequences import SequenceClassification
from .spans import SpanExtraction
from .tags import TokenClassification

__all__ = [
    "CausalLM", "GenerativeFineTuning", "MaskedLM", "MultiToken", "MultipleChoice", "ObjectiveConfig", "Seq2Seq",
    "SequenceClassification", "SpanExtraction", "TokenClassification",
]  # fmt: skip

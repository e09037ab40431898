from __future__ import annotations

from pathlib import Path

import pytest
from transformers import RobertaConfig, RobertaForMaskedLM

from .encoders import BASE, check_encoder, check_sizes

ARCHITECTURES = (
    "RobertaForMaskedLM", "RobertaForSequenceClassification", "RobertaForMultipleChoice",
    "RobertaForTokenClassification", "RobertaForQuestionAnswering", "RobertaModel",
)  # fmt: skip
VARIANTS = {
    "two types": {"type_vocab_size": 2},
    "odd heads": {"hidden_size": 21, "num_attention_heads": 3},
    "another padding": {"pad_token_id": 3},
    "relu in the layers only": {"hidden_act": "relu"},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parity(architecture: str, tmp_path: Path) -> None:
    check_encoder(RobertaConfig(**BASE, type_vocab_size=1), architecture, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, tmp_path: Path) -> None:
    config = RobertaConfig(**{**BASE, "type_vocab_size": 1, **VARIANTS[name]})
    check_encoder(config, "RobertaForMaskedLM", tmp_path)


def test_sizes() -> None:
    check_sizes("roberta-base", RobertaConfig, RobertaForMaskedLM, 124_697_433)
    check_sizes("roberta-large", RobertaConfig, RobertaForMaskedLM, 355_412_057)

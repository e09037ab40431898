from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AlbertConfig, AlbertForPreTraining

from landmark.models.backbone import Backbone
from landmark.weights.checkpoint import describe

from .encoders import BASE, check_encoder, check_sizes

ARCHITECTURES = (
    "AlbertForPreTraining", "AlbertForMaskedLM", "AlbertForSequenceClassification", "AlbertForMultipleChoice",
    "AlbertForTokenClassification", "AlbertForQuestionAnswering", "AlbertModel",
)  # fmt: skip
VARIANTS = {
    "groups": {"num_hidden_layers": 5, "num_hidden_groups": 2},
    "inner groups": {"num_hidden_groups": 3, "inner_group_num": 2},
    "odd heads": {"hidden_size": 21, "num_attention_heads": 3, "embedding_size": 7},
    "wide embeddings": {"embedding_size": 24},
    "relu, one type": {"hidden_act": "relu", "type_vocab_size": 1},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parity(architecture: str, tmp_path: Path) -> None:
    check_encoder(AlbertConfig(**BASE, embedding_size=8), architecture, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, tmp_path: Path) -> None:
    config = AlbertConfig(**{**BASE, "embedding_size": 8, **VARIANTS[name]})
    check_encoder(config, "AlbertForPreTraining", tmp_path)


def test_sizes() -> None:
    for name in ("albert-base-v2", "albert-large-v2", "albert-xlarge-v2", "albert-xxlarge-v2"):
        check_sizes(name, AlbertConfig, AlbertForPreTraining)


def test_parameters_fall_as_published() -> None:
    """12 and 18 M (Lan et al., table 1), 18 times fewer than BERT-large's 334 M. The table's 60 M is 59.0 here; its
    235 M is 223 M in the released xxlarge, as in the reference."""

    def count(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in describe(name)[0].build().parameters())

    assert [round(count(f"albert-{size}-v2") / 1e6) for size in ("base", "large", "xlarge", "xxlarge")] == [
        12,
        18,
        59,
        223,
    ]
    assert count("bert-large-cased") // count("albert-large-v2") == 18
    with torch.device("meta"):
        body = Backbone(describe("bert-large-uncased")[0])  # type: ignore[arg-type]
    assert round(sum(p.numel() for p in body.parameters()) / 1e6) == 334

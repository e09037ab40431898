from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
)

import landmark
from landmark.models.encoder import Encoder, for_task, with_heads
from landmark.nn.heads import SequenceHead, TokenHead

from .encoders import BASE, batch, check_encoder, check_sizes
from .families import close, reference, with_prefix_removed

ARCHITECTURES = (
    "BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction", "BertForSequenceClassification",
    "BertForMultipleChoice", "BertForTokenClassification", "BertForQuestionAnswering", "BertModel",
)  # fmt: skip
VARIANTS = {
    "odd heads": {"hidden_size": 21, "num_attention_heads": 3},
    "one type": {"type_vocab_size": 1},
    "relu": {"hidden_act": "relu"},
    "gelu_new": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    "silu": {"hidden_act": "silu"},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parity(architecture: str, tmp_path: Path) -> None:
    check_encoder(BertConfig(**BASE), architecture, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, tmp_path: Path) -> None:
    check_encoder(BertConfig(**{**BASE, **VARIANTS[name]}), "BertForPreTraining", tmp_path)


def test_sizes() -> None:
    check_sizes("bert-base-uncased", BertConfig, BertForPreTraining, 110_106_428)
    check_sizes("bert-base-cased", BertConfig, BertForPreTraining)
    check_sizes("bert-large-uncased", BertConfig, BertForPreTraining, 336_226_108)
    check_sizes("bert-large-cased", BertConfig, BertForPreTraining)


def edit(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Put tensors into a checkpoint, or take them out (None)."""
    path = directory / "model.safetensors"
    weights = {k: v for k, v in {**load_file(path), **change}.items() if v is not None}
    save_file(weights, path, metadata={"format": "pt"})


def test_the_oldest_files(tmp_path: Path) -> None:
    """gamma and beta, position buffers, a tied decoder that was written out, and what pre-training left behind."""
    reference(BertConfig(**BASE), BertForPreTraining, tmp_path)
    tokens, types, _ = batch()
    before = landmark.load(tmp_path)(tokens, types=types)
    weights = load_file(tmp_path / "model.safetensors")
    change: dict[str, torch.Tensor | None] = {}
    for name, tensor in weights.items():
        if "LayerNorm." in name:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            change |= {name: None, old: tensor}
    change["bert.embeddings.position_ids"] = torch.arange(40)[None]
    change["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].clone()
    change["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()
    edit(tmp_path, change)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    model = landmark.load(tmp_path)
    assert torch.equal(model(tokens, types=types), before)
    landmark.save(model, tmp_path / "back")
    close(before, BertForMaskedLM.from_pretrained(tmp_path / "back").eval()(tokens, token_type_ids=types).logits)
    edit(tmp_path, {"cls.predictions.decoder.weight": weights["bert.embeddings.word_embeddings.weight"] + 1})
    with pytest.raises(ValueError, match="no copy of the embedding"):
        landmark.load(tmp_path)


def test_body_without_its_head_or_prefix_lacks_what_the_task_needs(tmp_path: Path) -> None:
    reference(BertConfig(**BASE), BertForSequenceClassification, tmp_path)
    with_prefix_removed(tmp_path, "bert.")
    with pytest.raises(ValueError, match=r"lacks 2 tensors.*heads.classify.linear"):
        landmark.load(tmp_path)


def test_labels(tmp_path: Path) -> None:
    names = {0: "O", 1: "B-PER", 2: "I-PER"}
    config = BertConfig(**BASE, id2label=names, label2id={v: k for k, v in names.items()})
    model = check_encoder(config, "BertForTokenClassification", tmp_path)
    head = model.cfg.heads["tag"]
    assert isinstance(head, TokenHead.Config) and head.labels == ("O", "B-PER", "I-PER")
    hf = {**json.loads((tmp_path / "config.json").read_text()), "id2label": {"0": "a", "2": "b"}}
    with pytest.raises(ValueError, match="id2label"):
        landmark.build(hf)


def test_fine_tuning_begins_with_another_head(tmp_path: Path) -> None:
    """The body is shared, the head fresh, and transformers reads what is saved, labels and all."""
    reference(BertConfig(**BASE), BertForPreTraining, tmp_path)
    model = landmark.load(tmp_path)
    assert isinstance(model, Encoder)
    tuned = for_task(
        model, "SequenceClassification", ("bad", "good", "odd"), problem_type="single_label_classification"
    )
    tokens, types, mask = batch()
    assert torch.equal(model.hidden(tokens), tuned.hidden(tokens))
    assert tuned.embed.tokens.weight is model.embed.tokens.weight
    ours = tuned(tokens, types=types, segments=mask)
    assert ours.shape == (3, 3)
    landmark.save(tuned, tmp_path / "tuned")
    theirs = BertForSequenceClassification.from_pretrained(tmp_path / "tuned").eval()
    close(ours, theirs(tokens, attention_mask=mask, token_type_ids=types).logits)
    assert theirs.config.id2label == {0: "bad", 1: "good", 2: "odd"}
    assert theirs.config.problem_type == "single_label_classification"
    tagger = for_task(tuned, "TokenClassification")
    landmark.save(tagger, tmp_path / "tagger")
    theirs = BertForTokenClassification.from_pretrained(tmp_path / "tagger").eval()
    close(tagger(tokens), theirs(tokens).logits)
    with pytest.raises(ValueError, match="BertForTokenClassification"):
        for_task(model, "TokenClasification")
    own = with_heads(model, {"score": SequenceHead.Config(labels=("score",), act="relu")})
    landmark.save(own, tmp_path / "own")
    close(landmark.load(tmp_path / "own")(tokens), own(tokens))
    with pytest.raises(ValueError, match="published form"):
        for_task(own, "TokenClassification")


def test_bad_input(tmp_path: Path) -> None:
    hf = {**BASE, "architectures": ["BertForMaskedLM"]}
    for key, value in (
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("tie_word_embeddings", False),
    ):
        with pytest.raises(ValueError, match=key):
            landmark.build({**hf, key: value})
    with pytest.raises(ValueError, match="3 labels"):
        landmark.build({**hf, "architectures": ["BertForQuestionAnswering"], "num_labels": 3})
    model = landmark.build(hf)
    assert isinstance(model, Encoder)
    with pytest.raises(ValueError, match="no head 'mml'; did you mean 'mlm'"):
        model(torch.zeros(1, 3, dtype=torch.long), head="mml")
    with pytest.raises(ValueError, match="41 tokens does not fit the model's 40 positions"):
        model(torch.zeros(1, 41, dtype=torch.long))

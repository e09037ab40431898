from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DebertaConfig, DebertaForMaskedLM, DebertaV2Config, DebertaV2ForMaskedLM
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

import landmark
from landmark.models.deberta import with_mask_decoder, without_mask_decoder
from landmark.models.encoder import Encoder, for_task
from landmark.nn.disentangled import RelativePositions
from landmark.nn.linear import count
from landmark.weights.checkpoint import describe

from .encoders import BASE, batch, check_encoder, check_packing, check_sizes
from .families import close, perturb

TASKS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model")
PUBLISHED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
V3 = {**PUBLISHED, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True}
CONVOLUTION = {"conv_kernel_size": 3, "conv_act": "gelu"}
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "c2p": {"pos_att_type": ["c2p"]},
    "p2c": {"pos_att_type": "p2c"},
    "near": {"max_relative_positions": 5},
    "biased": {"position_biased_input": True, "type_vocab_size": 2},
    "odd heads": {"hidden_size": 21, "num_attention_heads": 3},
    "new head": {"legacy": False, "hidden_act": "relu"},
}
V2_VARIANTS: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "v3": V3,
    "far buckets": {**V3, "max_relative_positions": 11},
    "unshared buckets": {**V3, "share_att_key": False, "norm_rel_ebd": "none", "pos_att_type": "c2p|p2c"},
    "xxl": {**V3, **CONVOLUTION},
    "wide convolution": {**V3, "conv_kernel_size": 5, "conv_groups": 4},
}


@pytest.mark.parametrize("task", TASKS)
def test_parity(task: str, tmp_path: Path) -> None:
    check_encoder(DebertaConfig(**BASE, **PUBLISHED), "Deberta" + task, tmp_path)


@pytest.mark.parametrize("task", (*TASKS, "ForMultipleChoice"))
def test_parity_v2(task: str, tmp_path: Path) -> None:
    check_encoder(DebertaV2Config(**BASE, **V3, **CONVOLUTION), "DebertaV2" + task, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, tmp_path: Path) -> None:
    check_encoder(DebertaConfig(**{**BASE, **PUBLISHED, **VARIANTS[name]}), "DebertaForMaskedLM", tmp_path)


@pytest.mark.parametrize("name", V2_VARIANTS)
def test_variants_v2(name: str, tmp_path: Path) -> None:
    check_encoder(DebertaV2Config(**{**BASE, **PUBLISHED, **V2_VARIANTS[name]}), "DebertaV2ForMaskedLM", tmp_path)


def test_sizes() -> None:
    for name in ("base", "large", "xlarge"):
        check_sizes(f"deberta-{name}", DebertaConfig, DebertaForMaskedLM)
    for name in ("v2-xlarge", "v2-xxlarge", "v3-xsmall", "v3-small", "v3-base", "v3-large"):
        check_sizes(f"deberta-{name}", DebertaV2Config, DebertaV2ForMaskedLM)
    check_sizes("mdeberta-v3-base", DebertaV2Config, DebertaV2ForMaskedLM)


@pytest.mark.parametrize(
    ("name", "body", "table"),  # millions of parameters, as the models' cards give them
    [("deberta-v3-xsmall", 22, 48), ("deberta-v3-small", 44, 98), ("deberta-v3-base", 86, 98),
     ("deberta-v3-large", 304, 131), ("mdeberta-v3-base", 86, 190)],
)  # fmt: skip
def test_body_and_table_are_the_published_ones(name: str, body: int, table: int) -> None:
    with torch.device("meta"):
        model = describe(name)[0].build()
    assert isinstance(model, Encoder) and model.relative is not None
    assert count(model.layers) + count(model.relative) == pytest.approx(body * 1e6, rel=0.035)
    assert count(model.embed) == pytest.approx(table * 1e6, rel=0.03)


def without_architecture(tmp_path: Path) -> tuple[Path, DebertaV2ForMaskedLM]:
    """As DeBERTa v3's files are: no architecture, the body prefixed, the heads of both pre-trainings under names of
    their own."""
    theirs = DebertaV2ForMaskedLM(DebertaV2Config(**BASE, **V3, legacy=False)).eval()
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {f"mask_predictions.{name}": torch.ones(24) for name in ("dense.bias", "classifier.weight")}
    save_file({**load_file(path), **weights}, path, metadata={"format": "pt"})
    hf = json.loads((tmp_path / "config.json").read_text())
    del hf["architectures"], hf["legacy"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    return tmp_path, theirs


def test_files_that_name_no_architecture(tmp_path: Path) -> None:
    """The encoder without a head, which a task's head can follow; the head of masked LM where it is asked for."""
    directory, theirs = without_architecture(tmp_path)
    tokens = batch()[0]
    body = landmark.load(directory)
    assert isinstance(body, Encoder) and body.cfg.main is None and not body.heads
    with torch.no_grad():
        close(body(tokens), theirs.deberta(tokens).last_hidden_state)
        close(landmark.load(directory, architecture="DebertaV2ForMaskedLM")(tokens), theirs(tokens).logits)
    tagger = for_task(body, "TokenClassification", ("a", "b"))
    assert tagger(tokens).shape == (*tokens.shape, 2)
    landmark.save(body, tmp_path / "body")
    assert json.loads((tmp_path / "body" / "config.json").read_text())["architectures"] == ["DebertaV2Model"]
    assert torch.equal(landmark.load(tmp_path / "body")(tokens), body(tokens))
    assert describe(directory)[1]["architectures"] == ["DebertaV2Model"]


def test_a_head_of_a_task_is_not_left_out(tmp_path: Path) -> None:
    directory, _ = without_architecture(tmp_path)
    path = directory / "model.safetensors"
    save_file({**load_file(path), "classifier.weight": torch.ones(2, 24)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no rule knows the tensor 'classifier"):
        landmark.load(directory)


def test_every_distance_has_the_reference_bucket() -> None:
    with pytest.raises(ValueError, match="cannot reach to 100"):
        RelativePositions.Config(span=256, longest=100)
    for span, longest in ((256, 512), (4, 40), (32, 1000)):
        ours = RelativePositions.Config(span=span, longest=longest).build(8)(1500).rows
        theirs = build_relative_position(torch.zeros(1500, 1), torch.zeros(1500, 1), span, longest)[0]
        assert torch.equal(ours, (theirs + span).clamp(0, 2 * span - 1))


def test_unread_keys_are_errors() -> None:
    hf = {**BASE, **PUBLISHED, "architectures": ["DebertaForMaskedLM"]}
    for key, value in (
        ("position_buckets", 4),
        ("talking_head", True),
        ("embedding_size", 8),
        ("pos_att_type", "p2p"),
        ("relative_attention", False),
    ):
        with pytest.raises(ValueError, match=key):
            landmark.build({**hf, key: value})


def test_mask_decoder() -> None:
    """Against the layer's equations: queries that begin with positions and are refined, keys and values that stay."""
    plain = landmark.build({**BASE, **PUBLISHED, "architectures": ["DebertaForMaskedLM"]})
    assert isinstance(plain.cfg, Encoder.Config)
    model = with_mask_decoder(plain.cfg).build().double().eval()
    perturb(model)
    tokens, _, mask = batch()
    ctx = model.context(tokens, segments=mask)
    x = model.embed(tokens, ctx.positions)
    for layer in list(model.layers)[:-1]:
        x = layer(x, ctx)
    decoder = model.layers[-1]["decoder"]
    attn, norm, ffn = decoder.attn.fn, decoder.attn.norm, decoder.ffn
    heads, width = 4, tokens.shape[1]

    def split(y: torch.Tensor) -> torch.Tensor:
        return y.view(*y.shape[:-1], heads, -1)

    table = model.relative.table.weight
    k, v, k_r, q_r = (split(y) for y in (attn.k(x), attn.v(x), attn.position_k(table), attn.position_q(table)))
    distance = torch.arange(width)[:, None] - torch.arange(width) + 40
    queries = x + decoder.positions.table.weight[:width]
    for _ in range(2):
        q = split(attn.q(queries))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
        scores += torch.einsum("bqhd,qkhd->bhqk", q, k_r[distance]) + torch.einsum("bkhd,qkhd->bhqk", k, q_r[distance])
        weights = (scores / (3 * 6) ** 0.5).masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2)
        queries = norm(queries + attn.out(mixed))
        queries = ffn.norm(queries + ffn.fn.down(torch.nn.functional.gelu(ffn.fn.up(queries))))
    wanted = model.read("mlm", queries, ctx.bounds)
    close(model(tokens, segments=mask)[mask.bool()], wanted[mask.bool()], 1e-12)
    check_packing(model, tokens, None)
    plain.load_state_dict(without_mask_decoder(model.state_dict()))

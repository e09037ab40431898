from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MarianConfig, MarianMTModel

import landmark
from landmark.config import from_dict, to_dict
from landmark.models.encoder_decoder import EncoderDecoder
from landmark.models.registry import published

from .families import check_round_trip, close, perturb

BASE = dict(
    vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
    decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=40, pad_token_id=60, decoder_start_token_id=60,
    max_position_embeddings=64, scale_embedding=True, activation_function="relu",
)  # fmt: skip
VARIANTS = {
    "2017": {},
    "swish, not scaled": {"activation_function": "swish", "scale_embedding": False},
    "two vocabularies": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 61},
    "odd heads": {"d_model": 30, "encoder_attention_heads": 5, "decoder_attention_heads": 3},
}


def reference(directory: Path, **changes: object) -> MarianMTModel:
    torch.manual_seed(0)
    model = MarianMTModel._from_config(MarianConfig(**{**BASE, **changes}), attn_implementation="eager").eval()
    tables = [model.model.encoder.embed_positions.weight, model.model.decoder.embed_positions.weight]
    kept = [table.clone() for table in tables]  # constants, which are not on disk
    perturb(model)
    with torch.no_grad():
        for table, value in zip(tables, kept, strict=True):
            table.copy_(value)
        model.final_logits_bias.normal_()
    model.save_pretrained(directory)
    return model


def ours(directory: Path) -> EncoderDecoder:
    model = landmark.load(directory)
    assert isinstance(model, EncoderDecoder)
    return model


def ids(*shape: int, vocab: int = 61, seed: int = 1) -> Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_parity(name: str, tmp_path: Path) -> None:
    theirs, model = reference(tmp_path, **VARIANTS[name]), ours(tmp_path)
    source, target = ids(3, 13), ids(3, 9, seed=2)
    full = model(source, target)
    close(full, theirs(input_ids=source, decoder_input_ids=target).logits)
    check_round_trip(model, tmp_path)
    # Padded sources.
    keep = torch.ones_like(source)
    keep[1, 8:] = 0
    out = model(source, target, source_segments=keep)
    close(out, theirs(input_ids=source, attention_mask=keep, decoder_input_ids=target).logits)
    # Step by step, sources of different lengths.
    memory = model.encode_each([source[0].tolist(), source[1, :8].tolist(), source[2].tolist()])
    state = model.new_state(3, capacity=9)
    steps = [model.decoder(target[:, :4], memory=memory, state=state)]
    state.select([2, 0, 1])
    steps += [model.decoder(target[[2, 0, 1], t : t + 1], state=state)[[1, 2, 0]] for t in range(4, 9)]
    close(torch.cat(steps, 1), out)


@torch.no_grad()
def test_packed_pairs_equal_each_alone(tmp_path: Path) -> None:
    """Several pairs in a row, padding on both sides, more padding runs on one side than on the other."""
    reference(tmp_path)
    model = ours(tmp_path)
    source, target = ids(2, 13), ids(2, 9, seed=2)
    source_segments = torch.tensor([[1] * 5 + [2] * 8, [1] * 6 + [0] * 7])
    target_segments = torch.tensor([[1] * 4 + [2] * 3 + [0] * 2, [1] * 9])
    out = model(source, target, source_segments=source_segments, target_segments=target_segments)
    close(out[:1, :4], model(source[:1, :5], target[:1, :4]))
    close(out[:1, 4:7], model(source[:1, 5:], target[:1, 4:7]))
    close(out[1:], model(source[1:, :6], target[1:]))
    source[1, 6:], target[0, 7:] = 5, 5  # nothing sees the padding
    again = model(source, target, source_segments=source_segments, target_segments=target_segments)
    close(again[0, :7], out[0, :7])
    close(again[1], out[1])
    with pytest.raises(ValueError, match="3 source sequences cannot be paired with 2 target sequences"):
        model(source, target, source_segments=source_segments)


@torch.no_grad()
def test_old_files_with_copies_and_position_tables(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    reference(tmp_path)
    source, target = ids(2, 7), ids(2, 5, seed=2)
    want = ours(tmp_path)(source, target)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights["model.shared.weight"].clone()
    weights["model.encoder.embed_positions.weight"] = torch.zeros(64, 32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "config.json"
    old = {"static_position_embeddings": True, "normalize_before": False, "bad_words_ids": [[60]], "num_beams": 6}
    path.write_text(json.dumps(json.loads(path.read_text()) | old))
    assert torch.equal(ours(tmp_path)(source, target), want)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalize_before": True}))
    with pytest.raises(ValueError, match="normalize_before = True is not supported"):
        landmark.load(tmp_path)


def test_one_table_for_source_target_and_head(tmp_path: Path) -> None:
    """One tensor under one name, which all three uses train; our own layout keeps it so."""
    model = landmark.build({"architectures": ["MarianMTModel"], **BASE})
    assert isinstance(model, EncoderDecoder)
    assert [n for n in model.state_dict() if "tokens" in n] == ["decoder.embed.tokens.weight"]
    table = model.decoder.embed.tokens.weight
    model.encode(torch.tensor([[7]])).hidden.square().sum().backward()
    assert table.grad is not None and table.grad[7].abs().sum() > 0
    model.origin = None
    landmark.save(model.eval(), tmp_path)
    back = ours(tmp_path)
    assert back.cfg == model.cfg and back.encoder.embed is back.decoder.embed
    assert from_dict(to_dict(model.cfg)) == model.cfg
    with pytest.raises(ValueError, match="embeddings of encoder and decoder differ"):
        dataclasses.replace(
            model.cfg,
            encoder=dataclasses.replace(
                model.cfg.encoder, embed=dataclasses.replace(model.cfg.encoder.embed, scale=2.0)
            ),
        )


def test_dropout_where_the_paper_puts_it() -> None:
    """On the sum of embedding and position, and on what each sublayer adds (sec. 5.4)."""
    model = landmark.build({"architectures": ["MarianMTModel"], **BASE, "dropout": 0.25})
    assert isinstance(model, EncoderDecoder)
    for side in (model.cfg.encoder, model.cfg.decoder):
        assert side.embed.dropout == 0.25
        assert all(sublayer.dropout == 0.25 for layer in side.layers for sublayer in layer.values())
    source, target = ids(2, 7), ids(2, 5)
    assert not torch.equal(model(source, target), model(source, target))
    model.eval()
    assert torch.equal(model(source, target), model(source, target))


@pytest.mark.parametrize(("name", "millions"), [("transformer-base", 65), ("transformer-big", 213)])
def test_published_sizes(name: str, millions: int) -> None:
    """Table 3 counts 65 and 213 million; a shared vocabulary of 37000 makes it 63 and 214."""
    family, hf = published(name)
    with torch.device("meta"):
        count = sum(p.numel() for p in family.read(hf).build().parameters())
    assert abs(count / 1e6 - millions) < 2.5
    assert count == {"transformer-base": 63_119_496, "transformer-big": 214_282_376}[name]

"""Tiny random models and a tokenizer for the tests of generation."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

import landmark
from landmark.models.decoder import Decoder
from landmark.models.encoder_decoder import EncoderDecoder
from landmark.models.registry import families
from landmark.weights.tokenizer import Tokenizer
from landmark.weights.tokenizer_train import train_tokenizer

from ..models.families import perturb

LLAMA = dict(
    architectures=["LlamaForCausalLM"], vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
MARIAN = dict(
    architectures=["MarianMTModel"], vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=60,
    decoder_start_token_id=60, eos_token_id=0, max_position_embeddings=64, scale_embedding=True,
    activation_function="relu",
)  # fmt: skip
TINY = Path(__file__).parents[1] / "golden" / "tiny"


def build(hf: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = landmark.build(hf).eval()
    perturb(model, seed)
    return model


@functools.cache
def llama() -> Decoder:
    model: Decoder = build(LLAMA)
    return model


@functools.cache
def marian() -> EncoderDecoder:
    model: EncoderDecoder = build(MARIAN)
    return model


def every_family() -> dict[str, dict[str, Any]]:
    """A tiny config.json of every architecture that generates."""
    found = {}
    for architecture, family in sorted(families().items()):
        hf = {"architectures": [architecture], **json.loads((TINY / f"{family.name}.json").read_text())}
        with torch.device("meta"):
            if isinstance(landmark.build(hf), Decoder | EncoderDecoder):
                found[architecture] = hf
    return found


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer("bpe", [topics[name] for name in sorted(topics)][:40], 400)


@functools.cache
def speaker() -> Decoder:
    """A llama whose vocabulary is the tokenizer's."""
    model: Decoder = build(LLAMA | {"vocab_size": tokenizer().vocab_size, "eos_token_id": tokenizer().eos_id})
    return model

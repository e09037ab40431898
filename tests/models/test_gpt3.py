from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

import landmark
from landmark.weights.checkpoint import describe

from .encoders import check_sizes
from .families import check_decoder, close, reference, with_prefix_removed
from .layouts import without

BASE = dict(vocab_size=97, n_positions=40, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "odd heads and depth": {"n_embd": 21, "n_head": 3, "n_layer": 3},
    "narrow feed-forward": {"n_inner": 20, "activation_function": "relu"},
}
NEO = dict(vocab_size=97, max_position_embeddings=40, hidden_size=32, num_layers=4, num_heads=4, window_size=5)
NEO |= dict(attention_types=[[["global", "local"], 2]], bos_token_id=0, eos_token_id=0)
NEO_VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "odd heads": {"hidden_size": 21, "num_heads": 3, "intermediate_size": 20},
    "other order": {"attention_types": [[["local"], 2], [["global", "local"], 1]], "activation_function": "relu"},
}
WINDOW = 5


class Banded(GPT2LMHeadModel):
    """GPT-2 whose every second layer sees WINDOW tokens, itself among them."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        for block in self.transformer.h[1::2]:
            block.attn.register_forward_pre_hook(self.band, with_kwargs=True)

    @staticmethod
    def band(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict]:
        length = args[0].shape[1]
        mask = torch.full((length, length), -torch.inf)
        for i in range(length):
            mask[i, max(0, i - WINDOW + 1) : i + 1] = 0
        return args, {**kwargs, "attention_mask": mask[None, None]}


def as_gpt3(hf: dict) -> dict:
    return {**hf, "architectures": ["GPT3LMHeadModel"], "model_type": "gpt3", "attention_window": WINDOW}


@pytest.mark.parametrize("name", VARIANTS)
def test_parity(name: str, tmp_path: Path) -> None:
    model = check_decoder(GPT2Config(**{**BASE, **VARIANTS[name]}), Banded, tmp_path, edit=as_gpt3)
    windows = [layer["attn"].fn.cfg.window for layer in model.layers]
    assert windows == [None, WINDOW, None, WINDOW][: len(windows)]


def test_without_a_band_it_is_gpt2(tmp_path: Path) -> None:
    check_decoder(
        GPT2Config(**BASE), GPT2LMHeadModel, tmp_path, edit=lambda hf: {**as_gpt3(hf), "attention_window": None}
    )


@pytest.mark.parametrize("name", NEO_VARIANTS)
def test_gpt_neo(name: str, tmp_path: Path) -> None:
    check_decoder(GPTNeoConfig(**{**NEO, **NEO_VARIANTS[name]}), GPTNeoForCausalLM, tmp_path)


def test_gpt_neo_published_files(tmp_path: Path) -> None:
    """They have the buffers of every layer; some lack the list of layers, some the head's prefix."""
    theirs = reference(GPTNeoConfig(**NEO), GPTNeoForCausalLM, tmp_path)
    path = tmp_path / "model.safetensors"
    buffers = {f"transformer.h.{i}.attn.attention.bias": torch.ones(1, 1, 40, 40).tril() for i in range(4)}
    buffers |= {f"transformer.h.{i}.attn.attention.masked_bias": torch.tensor(-1e9) for i in range(4)}
    save_file({**load_file(path), **buffers}, path, metadata={"format": "pt"})
    with_prefix_removed(tmp_path, "transformer.")
    tokens = torch.arange(60).view(2, 30)
    model = landmark.load(tmp_path)
    close(model(tokens), theirs(tokens).logits)


def test_gpt_neo_without_the_list_of_layers(tmp_path: Path) -> None:
    check_decoder(GPTNeoConfig(**NEO), GPTNeoForCausalLM, tmp_path, edit=without("attention_layers"))


TABLE_D1 = {  # millions of parameters, as printed
    "gpt3-small": 125, "gpt3-medium": 356, "gpt3-large": 760, "gpt3-xl": 1_320, "gpt3-2.7b": 2_650,
    "gpt3-6.7b": 6_660, "gpt3-13b": 12_850, "gpt3-175b": 174_600,
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE_D1)
def test_sizes(name: str) -> None:
    """As many parameters as GPT-2 with the same keys, and as many as the paper's table to its digits."""
    hf = {**describe(name)[1]}
    hf.pop("attention_window"), hf.pop("architectures")
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT2LMHeadModel(GPT2Config(**hf | {"model_type": "gpt2"})).parameters())
        ours = sum(p.numel() for p in describe(name)[0].build().parameters())
    assert ours == count
    digit = 10 if TABLE_D1[name] > 1000 else 1
    assert round(count / 1e6 / digit) * digit == TABLE_D1[name]


@pytest.mark.parametrize("name", ["gpt-neo-125m", "gpt-neo-1.3b", "gpt-neo-2.7b"])
def test_gpt_neo_sizes(name: str) -> None:
    check_sizes(name, GPTNeoConfig, GPTNeoForCausalLM)


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("GPT3LMHeadModel", {"attention_window": 0}, "Attention.window is 0"),
        ("GPT3LMHeadModel", {"activation_function": "gelo"}, "did you mean 'gelu'"),
        ("GPT3LMHeadModel", {"attention_windw": 4}, "did you mean 'attention_window'"),
        ("GPTNeoForCausalLM", {"attention_types": [[["global", "locl"], 2]]}, "did you mean 'local'"),
        ("GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 3]]}, "names 6 layers, but num_layers is 4"),
        ("GPTNeoForCausalLM", {"attention_layers": ["local"] * 4}, "attention_layers"),
    ],
)
def test_bad_keys(architecture: str, keys: dict, message: str) -> None:
    base = NEO if architecture.startswith("GPTNeo") else BASE
    with pytest.raises(ValueError, match=message):
        landmark.build({"architectures": [architecture], **base, **keys})

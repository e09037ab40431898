"""Every published size of the Llama-like families: its count to the parameter, and its tensors beside transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from landmark.models.inspect import count, figures
from landmark.models.registry import Keys, published, sizes
from landmark.weights.rules import unload

PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
    "deepseek-67b": 67_425_001_472,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-2409": 22_247_282_688,
    "mistral-small-2501": 23_572_403_200,
    "mistral-large-2407": 122_610_069_504,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-4b-2507": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
}
CACHE = {  # bytes per token in bfloat16
    "llama3.1-405b": 516_096,
    "llama3.1-8b": 131_072,
    "llama2-7b": 524_288,
    "qwen2.5-72b": 327_680,
    "mistral-7b-v0.1": 131_072,
}
BODY = {  # parameters outside of the embeddings, in units of the last digit that the model cards give
    "qwen2.5-0.5b": 0.36e9,
    "qwen2.5-7b": 6.53e9,
    "qwen2.5-14b": 13.1e9,
    "qwen2.5-32b": 31.0e9,
    "qwen2.5-72b": 70.0e9,
    "qwen3-8b": 6.95e9,
    "qwen3-14b": 13.2e9,
    "gemma3-1b": 698e6,
}
HUB = {  # what the files on the hub say besides
    "llama3.2-1b": {"pretraining_tp": 1, "head_dim": 64, "mlp_bias": False, "attention_bias": False, "use_cache": True},
    "llama-7b": {"max_sequence_length": 2048, "hidden_act": "silu", "pad_token_id": 0, "torch_dtype": "float16"},
    "mistral-7b-v0.1": {"hidden_act": "silu", "initializer_range": 0.02, "transformers_version": "4.34.0.dev0"},
    "qwen2.5-7b": {"use_mrope": False, "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
    "qwen3-0.6b": {"rope_scaling": None, "sliding_window": None, "max_window_layers": 28, "use_sliding_window": False},
    "gemma-2b": {"hidden_act": "gelu", "hidden_activation": None, "rope_scaling": None, "attention_bias": False},
    "gemma2-9b": {"hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 4096, "cache_implementation": "hybrid"},
    "gemma3-1b": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "eos_token_id": [1, 106]},
}
FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"}


def meta(name: str) -> tuple[Any, Any, dict[str, Any]]:
    family, hf = published(name)
    with torch.device("meta"):
        return family, family.read(hf).build(), hf


def test_every_size_is_here() -> None:
    assert {name for name, (family, _) in sizes().items() if family.name in FAMILIES} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_size_is_the_published_one(name: str) -> None:
    family, ours, hf = meta(name)
    assert count(ours) == PARAMETERS[name]
    keys = {key: value for key, value in hf.items() if key not in ("model_type", "architectures")}
    config = AutoConfig.for_model(hf["model_type"], **keys)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    assert type(theirs).__name__ == hf["architectures"][0]
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    want = {key: tensor.shape for key, tensor in theirs.state_dict().items() if key not in tied}
    have = unload(family.rules(Keys(hf)), ours.state_dict())
    assert {key: tensor.shape for key, tensor in have.items()} == want
    written = {**config.to_diff_dict(), "architectures": hf["architectures"]}
    assert family.read(written) == ours.cfg  # what transformers makes of this size reads as the same model


@pytest.mark.parametrize("name", CACHE)
def test_cache_bytes(name: str) -> None:
    assert figures(meta(name)[1], context=100).cache_per_token == CACHE[name]


@pytest.mark.parametrize("name", BODY)
def test_parameters_outside_of_the_embeddings(name: str) -> None:
    made = figures(meta(name)[1], context=1)
    assert made.parameters - made.embedding == pytest.approx(BODY[name], rel=0.01)


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_files_read_as_the_published_size(name: str) -> None:
    family, hf = published(name)
    assert family.read({**hf, **HUB[name]}) == family.read(hf)

"""Adapters in PEFT's format, beside PEFT: what it writes is read, what is written it reads, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import landmark
from landmark.models.base import Model
from landmark.transforms.lora import Adapter, attach, fresh, merge, read_adapter, write_adapter
from landmark.transforms.quantise import quantise
from landmark.weights.low_rank import LowRank

from ..models.families import close, reference

TOKENS = torch.randint(5, 60, (2, 13), generator=torch.Generator().manual_seed(0))
USUAL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PLAIN = {key: value for key, value in USUAL.items() if key != "num_key_value_heads"}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", USUAL, {"target_modules": ["q_proj", "v_proj"]}),
    "all": ("LlamaForCausalLM", USUAL, {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3}),
    "ranks": (
        "LlamaForCausalLM", USUAL,
        {"target_modules": r".*\.(q_proj|down_proj)", "alpha_pattern": {"q_proj": 5},
         "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn.q_proj": 7}},
    ),
    "layers": ("LlamaForCausalLM", USUAL, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "excluded": (
        "LlamaForCausalLM", USUAL, {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "neox": ("GPTNeoXForCausalLM", PLAIN, {"target_modules": ["query_key_value", "dense", "dense_4h_to_h"]}),
    "phi3": ("Phi3ForCausalLM", USUAL, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "gemma2": ("Gemma2ForCausalLM", USUAL | {"head_dim": 8}, {"target_modules": ["k_proj", "o_proj", "gate_proj"]}),
    "mixtral": ("MixtralForCausalLM", USUAL | EXPERTS, {"target_modules": ["q_proj", "o_proj"]}),
    "mamba": ("MambaForCausalLM", {"vocab_size": 61, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2,
                                  "time_step_rank": 4}, {"target_modules": ["in_proj", "x_proj"]}),
    "bert": ("BertForMaskedLM", PLAIN, {"target_modules": ["query", "value", "dense"]}),
}  # fmt: skip


def of_peft(where: Path, architecture: str, size: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Tensor]:
    """A tiny model with a random adapter, both saved, and its logits."""
    cls = getattr(transformers, architecture)
    base = reference(cls.config_class(**size), cls, where / "base")
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "lora_dropout": 0.1, **options}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    theirs.save_pretrained(where / "adapter")
    with torch.no_grad():
        return theirs, theirs(TOKENS).logits


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(TOKENS)
        return out


@pytest.mark.parametrize("case", CASES)
def test_beside_peft(case: str, tmp_path: Path) -> None:
    """Its logits, with factors beside the weights and merged into them; its files, to the bit."""
    _, want = of_peft(tmp_path, *CASES[case])
    model = landmark.load(tmp_path / "base")
    adapter = read_adapter(tmp_path / "adapter", model)
    write_adapter(adapter, model, tmp_path / "again")
    same(tmp_path / "adapter", tmp_path / "again")
    plain = logits(model)
    adapters = attach(model, {"one": adapter})
    assert torch.equal(logits(model), plain)
    with adapters.use("one"):
        close(logits(model), want)
    assert (want - plain).abs().max() > 0.05 * want.abs().max()
    merged = landmark.load(tmp_path / "base")
    merge(merged, adapter)
    close(logits(merged), want)


def same(one: Path, other: Path) -> None:
    a, b = (load_file(d / "adapter_model.safetensors") for d in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    a, b = (json.loads((d / "adapter_config.json").read_text()) for d in (one, other))
    assert a == b


@pytest.mark.parametrize("case", ["llama", "gpt2", "neox", "phi3"])
def test_peft_reads_ours(case: str, tmp_path: Path) -> None:
    """An adapter of our own maps, some of which are parts of one of theirs, each with an A and a rank of its own."""
    architecture, size, _ = CASES[case]
    cls = getattr(transformers, architecture)
    base = reference(cls.config_class(**size), cls, tmp_path / "base")
    model = landmark.load(tmp_path / "base")
    torch.manual_seed(2)
    ours = Adapter(fresh(model, 3, 6.0, ["q", "down"]).factors | fresh(model, 2, 6.0, ["v"]).factors)
    for low in ours.factors.values():
        low.left = torch.randn_like(low.left) * 0.3
    write_adapter(ours, model, tmp_path / "adapter")
    adapters = attach(model, {"own": ours})
    with adapters.use("own"):
        want = logits(model)
    with torch.no_grad():
        close(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(TOKENS).logits, want)
    back = landmark.load(tmp_path / "base")
    merge(back, read_adapter(tmp_path / "adapter", back))
    close(logits(back), want)


def test_coded_weights(tmp_path: Path) -> None:
    """Beside weights in 8 bits: what the adapter adds is what it adds to those, restored."""
    of_peft(tmp_path, *CASES["llama"])
    coded = quantise(landmark.load(tmp_path / "base"), 8, outer=None)
    adapter = read_adapter(tmp_path / "adapter", coded)
    attach(coded, {"one": adapter}).choose("one")
    restored = landmark.load(tmp_path / "base")
    for name, module in restored.named_modules():
        if name in adapter.factors or name.endswith((".k", ".out", ".gate", ".up", ".down")):
            inside = coded.get_submodule(name)
            weight = (inside.base if name in adapter.factors else inside).weight
            module.weight = torch.nn.Parameter(weight)
    merge(restored, adapter)
    close(logits(coded), logits(restored), 0.02)
    with pytest.raises(ValueError, match=r"is a CodedLinear and cannot take it up"):
        merge(quantise(landmark.load(tmp_path / "base"), 8), adapter)


def test_a_model_of_our_own(tmp_path: Path) -> None:
    """Where no family has names for it, the maps' names are ours."""
    model = landmark.build(hybrid()).eval()
    adapter = fresh(model, 4, targets=["q", "out"])
    for low in adapter.factors.values():
        low.left = torch.randn_like(low.left)
    write_adapter(adapter, model, tmp_path)
    assert all(".layers." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    back = read_adapter(tmp_path, model)
    assert back.factors.keys() == adapter.factors.keys()
    assert all(torch.equal(low.left, adapter.factors[name].left) for name, low in back.factors.items())


def hybrid() -> dict[str, Any]:
    tree = {"type": "Pattern", "pattern": "mamba + attention", "dim": 32, "vocab_size": 61}
    return {"architectures": ["LandmarkModel"], "config": tree}


def test_experts_of_older_files(tmp_path: Path) -> None:
    """Adapters of single experts, as written when these were modules of their own: merged, and written again."""
    config = transformers.MixtralConfig(**USUAL, **EXPERTS)
    reference(config, transformers.MixtralForCausalLM, tmp_path / "base")
    model, tensors, names = landmark.load(tmp_path / "base"), {}, {"w1": (48, 32), "w2": (32, 48)}
    torch.manual_seed(0)
    for layer in range(2):
        for expert in range(4):
            for name, (out, width) in names.items():
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(3, width)
                tensors[f"{path}.lora_B.weight"] = torch.randn(out, 3)
    directory = write(tmp_path / "adapter", tensors, target_modules=["w1", "w2"], r=3, lora_alpha=6)
    adapter = read_adapter(directory, model)
    write_adapter(adapter, model, tmp_path / "again")
    same(directory, tmp_path / "again")
    before = model.state_dict()
    merge(model, adapter)
    for layer, expert in ((0, 1), (1, 3)):
        path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.w2"
        change = 2 * tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
        name = f"layers.{layer}.ffn.fn.experts.down.weight"
        torch.testing.assert_close(model.state_dict()[name][expert], before[name][expert] + change)
    with pytest.raises(ValueError, match=r"'layers.0.ffn.fn.experts.gate', which is a stack of experts; merge it"):
        attach(model, {"experts": adapter})


def write(directory: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return directory


KEY = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
PAIR = {"A": torch.ones(2, 32), "B": torch.ones(32, 2)}
GOOD = {KEY.format(layer, "q_proj", side): tensor for layer in (0, 1) for side, tensor in PAIR.items()}


def without(*keys: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in GOOD.items() if key not in keys}


BAD: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "another method": ({"peft_type": "IA3"}, GOOD, r"peft_type is 'IA3'; only LORA"),
    "dora": ({"use_dora": True}, GOOD, r"use_dora = True is not supported"),
    "biases": ({"bias": "all"}, GOOD, r"bias = 'all' is not supported"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, GOOD, r"modules_to_save = \['lm_head'\] is not supported"),
    "another base": ({"init_lora_weights": "pissa"}, GOOD, r"init_lora_weights = 'pissa' is not supported"),
    "unheard of": ({"use_magic": 3}, GOOD, r"use_magic = 3 is not supported"),
    "no rank": ({"r": 0}, GOOD, r"r is 0; the rank is a whole number"),
    "no targets": ({"target_modules": None}, GOOD, r"names no target_modules"),
    "rank": ({"r": 4}, GOOD, r"lora_A of 'model.layers.0.self_attn.q_proj' has the shape \(2, 32\), but .* \(4, 32\)"),
    "width": ({}, GOOD | {KEY.format(1, "q_proj", "A"): torch.ones(2, 64)}, r"\(2, 64\), but .* made for another one"),
    "half": ({}, without(KEY.format(1, "q_proj", "B")), r"lora_B of 'model.layers.1.self_attn.q_proj' is missing"),
    "a layer": (
        {}, without(KEY.format(1, "q_proj", "B"), KEY.format(1, "q_proj", "A")),
        r"lacks 1 maps that its config names, the first 'model.layers.1.self_attn.q_proj'",
    ),
    "too deep": (
        {}, GOOD | {KEY.format(2, "q_proj", side): tensor for side, tensor in PAIR.items()},
        r"changes 'model.layers.2.self_attn.q_proj', but the model has no such linear map",
    ),
    "not named": (
        {}, GOOD | {KEY.format(0, "o_proj", side): tensor for side, tensor in PAIR.items()},
        r"changes 'model.layers.0.self_attn.o_proj', which target_modules of its config leaves out",
    ),
    "embedding": (
        {}, GOOD | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 61)},
        r"'base_model.model.model.embed_tokens.lora_embedding_A' is not understood",
    ),
    "empty": ({}, {"x": torch.ones(1)}, "'x' is not understood"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters(case: str, tmp_path: Path) -> None:
    changes, tensors, message = BAD[case]
    directory = write(tmp_path, tensors, **{"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], **changes})
    with pytest.raises(ValueError, match=message) as error:
        read_adapter(directory, tiny())
    assert "\n" not in str(error.value)


def tiny() -> Model:
    return landmark.build({"architectures": ["LlamaForCausalLM"], **USUAL}).eval()


def test_bad_files(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"is no directory, and no hub id"):
        read_adapter("no such adapter", model)
    with pytest.raises(ValueError, match=r"holds no adapter_config.json"):
        read_adapter(tmp_path, model)
    write(tmp_path, GOOD, r=2, target_modules=["q_proj"])
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not a tensor in sight")
    with pytest.raises(ValueError, match=r"truncated or corrupt"):
        read_adapter(tmp_path, model)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no adapter_model.safetensors; only safetensors"):
        read_adapter(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"peft_type is \[1\]"):
        read_adapter(tmp_path, model)
    with pytest.raises(ValueError, match=r"changes 'layers.9.attn.fn.q', but the model has no such"):
        write_adapter(Adapter({"layers.9.attn.fn.q": LowRank.nothing(2, 2)}), model, tmp_path)

"""BitNet: plain, as it is trained and packed, beside transformers; and any other model made ternary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitNetConfig, BitNetForCausalLM, BitNetQuantConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights, replace_with_bitnet_linear

import landmark
from landmark.models.inspect import count, figures
from landmark.models.registry import published
from landmark.nn import bitlinear
from landmark.transforms.bitnet import bitnet, pack_ternary
from landmark.weights.files import read_tensors

from .families import check_decoder, check_decoding, check_packing, check_round_trip, close, perturb

BASE: dict[str, Any] = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
BASE |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None)
TOKENS = torch.arange(2 * 23).view(2, 23) * 7 % 97
FORMS = {
    "bitlinear": ("bitlinear", "offline"),
    "autobitlinear": ("autobitlinear", "offline"),
    "trained": ("autobitlinear", "online"),
}


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """transformers compiles its bit arithmetic, which takes a minute."""
    before = torch._dynamo.config.disable
    torch._dynamo.config.disable = True
    yield
    torch._dynamo.config.disable = before


@pytest.mark.parametrize("tied", [False, True])
def test_plain_parity(tied: bool, tmp_path: Path) -> None:
    config = BitNetConfig(**BASE, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2)
    model = check_decoder(config, BitNetForCausalLM, tmp_path)
    assert model.cfg.layers[0]["ffn"].fn.act == "relu2"


def reference(kind: str, form: str, norm: bool, directory: Path) -> torch.nn.Module:
    """transformers' model with ternary maps in one of the published forms, written as its files are."""
    cls, config = {
        "bitnet": (BitNetForCausalLM, BitNetConfig(**BASE, bos_token_id=1, eos_token_id=2)),
        "llama": (LlamaForCausalLM, LlamaConfig(**BASE)),
    }[kind]
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager").eval()
    perturb(model)
    linear_class, mode = FORMS[form]
    quant = BitNetQuantConfig(
        linear_class=linear_class, quantization_mode=mode, use_rms_norm=norm, rms_norm_eps=1e-5,
        modules_to_not_convert=["lm_head"],
    )  # fmt: skip
    weights = {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    model = replace_with_bitnet_linear(model, ["lm_head"], quant)
    files = {}
    for name, m in model.named_modules():
        if not isinstance(m, BitLinear | AutoBitLinear):
            continue
        if m.rms_norm is not None:
            m.rms_norm.weight = torch.nn.Parameter(1 + 0.2 * torch.randn(weights[name].shape[1]))
        scale = weights[name].abs().mean().view(1)
        rounded = (weights[name] / scale).round().clamp(-1, 1)
        if isinstance(m, BitLinear):
            m.dtype, m.weight, m.weight_scale = torch.float32, pack_weights(rounded), 1 / scale
        elif mode == "offline":
            m.weight, m.weight_scale = torch.nn.Parameter(rounded.clone()), scale
            files[f"{name}.weight"] = pack_weights(rounded)
        else:
            m.weight = torch.nn.Parameter(weights[name])
    model.config.quantization_config = quant.to_dict()
    model.save_pretrained(directory, state_dict={**model.state_dict(), **files})
    said = json.loads((directory / "config.json").read_text())
    said["quantization_config"] = json.loads(json.dumps(quant.to_dict()))
    (directory / "config.json").write_text(json.dumps(said))
    return model.eval()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["bitnet", "llama"])
@torch.no_grad()
def test_ternary_parity(kind: str, form: str, norm: bool, tmp_path: Path) -> None:
    theirs = reference(kind, form, norm, tmp_path)
    model = landmark.load(tmp_path)
    made = bitlinear.BitLinear if form == "trained" else bitlinear.PackedBitLinear
    assert isinstance(model.layers[0]["attn"].fn.q, made)
    if form != "trained":
        assert read_tensors(tmp_path)["model.layers.0.mlp.down_proj.weight"].shape == (8, 48)
    full = model(TOKENS)
    close(full, theirs(TOKENS, use_cache=False).logits)
    check_round_trip(model, tmp_path)
    check_packing(model, TOKENS)
    check_decoding(model, TOKENS, full)


@pytest.mark.parametrize("rms_norm", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "native", "mixtral"])
@torch.no_grad()
def test_any_model_becomes_ternary(kind: str, rms_norm: bool, tmp_path: Path) -> None:
    """Made, packed, saved and loaded: the same numbers all along, and transformers' where its files say it."""
    hf: dict[str, Any] = {**BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if kind == "gpt2":
        hf = dict(architectures=["GPT2LMHeadModel"], vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    if kind == "mixtral":
        hf = {**BASE, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    plain = landmark.build(hf)
    if kind == "native":
        plain.origin = None
    perturb(plain)
    norm = bitlinear.BitLinear.Config(rms_norm=bitlinear.RMSNorm.Config() if rms_norm else None)
    model = bitnet(plain.eval(), norm)
    assert isinstance(model.head.linear, landmark.nn.linear.Linear | None)
    assert type(model.layers[0]["attn"].fn.q) is bitlinear.BitLinear
    packed = pack_ternary(model)
    want = model(TOKENS)
    assert not torch.allclose(want, plain(TOKENS), atol=1e-3)
    assert torch.equal(packed(TOKENS), want)
    for name, made in (("trained", model), ("packed", packed)):
        landmark.save(made, tmp_path / name)
        back = landmark.load(tmp_path / name)
        assert torch.equal(back(TOKENS), want) and back.cfg == made.cfg
    if kind == "mixtral":
        experts = packed.layers[0]["ffn"].fn.experts
        assert isinstance(experts.up, bitlinear.PackedBitExperts) and experts.up.weight.shape == (4, 12, 32)
        alone = bitlinear.BitLinear(norm, landmark.nn.linear.Linear(32, 48, bias=False))
        for e in range(4):  # each expert is a ternary linear map of its own
            alone.weight.copy_(model.layers[0]["ffn"].fn.experts.up.weight[e])
            x, counts = torch.randn(5, 32), torch.tensor([5 if i == e else 0 for i in range(4)])
            assert torch.equal(experts.up(x, counts), alone(x))
        assert count(packed) == count(model) and figures(packed).active == figures(model).active < count(model)
        assert figures(packed).flops == figures(model).flops
    if kind == "llama":
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "trained", attn_implementation="eager")
        close(want, theirs(TOKENS, use_cache=False).logits)
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "packed", attn_implementation="eager")
        close(want, theirs(TOKENS, use_cache=False).logits)


def test_it_learns() -> None:
    """Gradients reach every weight that is rounded, and steps along them lower the loss."""
    torch.manual_seed(0)
    model = bitnet(landmark.build({**BASE, "architectures": ["LlamaForCausalLM"]})).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = model.loss(model.hidden(TOKENS[:, :-1]), TOKENS[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_published_size() -> None:
    for name in ("bitnet-b1.58-2b-4t", "bitnet-b1.58-2b-4t-bf16"):
        family, hf = published(name)
        with torch.device("meta"):
            model = family.read(hf).build()
        assert count(model) == 2_412_820_480
        memory = figures(model).memory
        assert memory["ternary"] == 2_084_044_800 // 4 + 2 * (2_412_820_480 - 2_084_044_800)
        assert memory["bfloat16"] / memory["ternary"] > 4
        assert figures(model).flops == figures(model, context=4096).flops > 2 * 2_084_044_800


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "gptqq"}, "quant_method = 'gptqq' is not supported"),
        ({"quant_method": "bitnet", "linear_class": "bitlinaer"}, "did you mean 'bitlinear'"),
        ({"quant_method": "bitnet", "quantization_mode": "onlin"}, "did you mean 'online'"),
        ({"quant_method": "bitnet", "quantization_mode": "online"}, "never 'online'"),
        ({"quant_method": "bitnet", "bits": 3}, "quantization_config.bits is not understood"),
        ({"quant_method": "bitnet", "modules_to_not_convert": ["model.layers.0.mlp"]}, "model.layers.0.mlp"),
    ],
)
def test_what_is_not_understood(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark.build({**BASE, "architectures": ["LlamaForCausalLM"], "quantization_config": said})


def test_models_that_cannot_be_made_or_packed() -> None:
    plain = landmark.build({**BASE, "architectures": ["LlamaForCausalLM"]})
    with pytest.raises(ValueError, match="no ternary linear maps"):
        pack_ternary(plain)
    with pytest.raises(ValueError, match="are PackedBitLinear already"):
        bitnet(pack_ternary(bitnet(plain)))

"""Residual sublayers in one call: what they are module by module, for every variant; and who may look on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import landmark
from landmark.infer.session import Session
from landmark.models.decoder import Decoder
from landmark.nn import residual
from landmark.nn import step as nn_step
from landmark.ops import step
from landmark.ops.linear import linear
from landmark.transforms.quantise import quantise, quantised

needs_kernel = pytest.mark.skipif(step.SOURCE.why_not() is not None, reason="no C compiler")
BASE: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": BASE | {"architectures": ["LlamaForCausalLM"]},
    "biased": BASE | {"architectures": ["Qwen2ForCausalLM"]},
    "normed heads": BASE | {"architectures": ["Qwen3ForCausalLM"]},
    "shifted norms": BASE | {"architectures": ["GemmaForCausalLM"], "hidden_activation": "gelu_pytorch_tanh"},
    "scaled": BASE | {"architectures": ["LlamaForCausalLM"]},
    "between two norms": BASE | {
        "architectures": ["Gemma2ForCausalLM"], "sliding_window": 256, "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 5.0, "hidden_activation": "gelu_pytorch_tanh",
    },
    "means taken out": {
        "architectures": ["GPT2LMHeadModel"], "vocab_size": 90, "n_positions": 256, "n_embd": 128, "n_layer": 3,
        "n_head": 4,
    },
    "side by side, normed apart": {
        "architectures": ["GPTNeoXForCausalLM"], "vocab_size": 90, "hidden_size": 128, "intermediate_size": 160,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256, "rotary_pct": 0.5,
    },
    "side by side": {
        "architectures": ["CohereForCausalLM"], "vocab_size": 90, "hidden_size": 128, "intermediate_size": 160,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    },
    "experts": BASE | {
        "architectures": ["MixtralForCausalLM"], "num_local_experts": 5, "num_experts_per_tok": 2,
    },
    "many experts": BASE | {
        "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 24, "num_experts_per_tok": 4,
        "moe_intermediate_size": 48, "norm_topk_prob": True,
    },
    "shared experts": BASE | {
        "architectures": ["DeepseekForCausalLM"], "n_routed_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 48, "n_shared_experts": 2, "first_k_dense_replace": 1,
    },
}  # fmt: skip
STEPS = {"shared experts": 8}  # of all layers, if not two a layer


def built(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)
    model = landmark.build(MODELS[name])
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if name == "scaled" and isinstance(module, residual.PreNorm):
            module.scale = 0.4
    assert isinstance(model, Decoder)
    return model.to(dtype).eval()


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, use: bool = True) -> Iterator[list[int]]:
    """How many sublayers each call was; with `use` False, there may be none."""
    found: list[int] = []
    run = step.run

    def watched(x: Tensor, steps: bytearray, first: int, count: int) -> Tensor:
        found.append(count)
        return run(x, steps, first, count)

    with monkeypatch.context() as patch:
        patch.setattr(step, "run", watched)
        if not use:
            patch.setattr(nn_step, "few", lambda x, ctx: False)
        yield found


def logits(model: Decoder, rows: int = 3) -> Tensor:
    """Of five single tokens after beginnings of different lengths."""
    session = Session(model, rows, 64)
    generator = torch.Generator().manual_seed(1)
    session.extend([torch.randint(0, 90, (4 + 7 * i,), generator=generator).tolist() for i in range(rows)])
    return torch.stack([session.extend([[(5 * t + i) % 90] for i in range(rows)]) for t in range(5)])


@needs_kernel
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_one_call_is_what_the_modules_are(
    name: str, dtype: torch.dtype, bits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(name, dtype)
    if bits is not None:
        coded = quantise(model, bits)
        assert isinstance(coded, Decoder)
        model = coded
    with counted(monkeypatch) as calls:
        got = logits(model)
    with counted(monkeypatch, use=False):
        want = logits(model)
    assert calls == [STEPS.get(name, 6)] * 5, "a token was not one call"
    error = (got.float() - want.float()).abs().max() / want.float().abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@needs_kernel
@pytest.mark.parametrize("rows", [[[5, 6, 7, 8], [9, 10]], [[5, 6, 7], [8, 9, 10]], [[5], list(range(6, 21))]])
@pytest.mark.parametrize("name", MODELS)
def test_a_few_more_tokens_of_each_text(name: str, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(name)
    found = []
    for use in (True, False):
        session = Session(model, 2, 32)
        session.extend([[1, 2, 3], [4]])
        with counted(monkeypatch, use) as calls:
            found.append(session.extend(rows))
        assert calls == [STEPS.get(name, 6)] * use
        found.append(session.extend([[11], [12]]))  # what was kept is right too
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-4, atol=1e-5)
    for row, beginning in enumerate(([1, 2, 3], [4])):
        with counted(monkeypatch, use=False):
            alone = Session(model, 1, 32).extend([beginning + rows[row]])
        torch.testing.assert_close(found[0][row], alone[0], rtol=1e-4, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("way", [None, "int8", "int4-a8", "bf16-11"])
@pytest.mark.parametrize("name", MODELS)
def test_several_tokens_are_one_after_the_other_to_the_bit(name: str, way: str | None) -> None:
    """So in bfloat16 too guesses are judged by what would have been said without them."""
    model = built(name, torch.bfloat16)
    if way is not None:
        coded = quantised(model, way)
        assert isinstance(coded, Decoder)
        model = coded

    def read(*pieces: list[list[int]]) -> Tensor:
        session = Session(model, 2, 40)
        session.extend([[1, 2, 3], [4]])
        with torch.no_grad():
            said = [model.hidden(torch.tensor(piece), state=session.state) for piece in pieces]
        return torch.cat(said, 1)

    texts = [list(range(7, 15)), list(range(20, 28))]
    want = read(*([row[t : t + 1] for row in texts] for t in range(8)))
    assert torch.equal(read(texts), want)
    assert torch.equal(read([row[:3] for row in texts], [row[3:] for row in texts]), want)


@needs_kernel
def test_what_is_no_step_stands_between_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """OLMo 2 norms queries and keys over all heads, which the kernel does not; its feed-forwards have no norm first."""
    torch.manual_seed(0)
    model = landmark.build(BASE | {"architectures": ["Olmo2ForCausalLM"], "head_dim": 24}).eval()
    assert isinstance(model, Decoder)
    with counted(monkeypatch) as calls:
        got = logits(model)
    with counted(monkeypatch, use=False):
        want = logits(model)
    assert calls == [1] * 15
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@needs_kernel
def test_hooks_and_changed_weights_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama")
    before = logits(model)
    seen: list[str] = []
    watched = [m for n, m in model.named_modules() if n.endswith(("1.ffn.fn.up", "2.attn.norm", "0.attn.fn"))]
    handles = [m.register_forward_hook(lambda m, i, o: seen.append(type(m).__name__)) for m in watched]
    with counted(monkeypatch) as calls:
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert len(watched) == 3 and set(seen) == {"Linear", "RMSNorm", "Attention"}
    assert calls == [2, 1] * 5  # layer 0's feed-forward and layer 1's attention; the last one's feed-forward
    for handle in handles:
        handle.remove()
    with counted(monkeypatch) as calls:
        logits(model)
    assert calls == [6] * 5  # one again
    handle = model.layers[1].register_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    with counted(monkeypatch) as calls:
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert calls == [2, 1, 1, 2] * 5 and seen.count("Block") == 6  # a watched layer is called, its sublayers one by one
    handle.remove()
    every = nn.modules.module.register_module_forward_hook(lambda m, i, o: None)
    with counted(monkeypatch) as calls:
        logits(model)
    assert not calls  # somebody looks at all modules there are
    every.remove()
    replaced = model.get_submodule("layers.1.ffn.fn.down")
    replaced.forward = lambda x: linear(x, replaced.weight) * 5  # type: ignore[arg-type]
    with counted(monkeypatch) as calls:
        assert not torch.allclose(logits(model), before)
    assert calls == [3, 2] * 5  # what has another forward in its place is called
    del replaced.forward
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    scaled = model.get_submodule("layers.1.ffn")
    assert isinstance(scaled, residual.PreNorm)
    scaled.scale = 0.5
    assert not torch.allclose(logits(model), before)
    with counted(monkeypatch, use=False):
        want = logits(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    scaled.scale = 1.0
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert vars(model.layers)["_kept"] is not None and vars(again.layers)["_kept"] is None
    assert torch.equal(logits(again), logits(model))
    other = built("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    want = logits(other)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(logits(model), want)
    third = built("llama").get_submodule("layers.1.ffn.fn.up")
    own, holder = other.get_submodule("layers.1.ffn.fn.up"), model.get_submodule("layers.1.ffn.fn")
    holder.up = third  # another module in its place
    assert not torch.equal(logits(model), want)
    holder.up = own
    assert torch.equal(logits(model), want)
    kept = own.weight.data
    own.weight.data = third.weight.data.clone()  # the same parameter somewhere else
    assert not torch.equal(logits(model), want)
    own.weight.data = kept
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data / 1.5
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model.to(torch.bfloat16)), logits(built("llama", torch.bfloat16)))


@needs_kernel
def test_with_gradients_modules_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama")
    state = model.new_state(1, 8)
    with counted(monkeypatch) as calls:
        model(torch.tensor([[3]]), state=state).sum().backward()
    assert not calls


@needs_kernel
def test_training_keeps_its_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama").train()
    with counted(monkeypatch) as calls:
        logits(model)
    assert not calls


def test_what_the_kernel_takes() -> None:
    with torch.no_grad():
        assert step.why_not(torch.zeros(2, 1, 8)) == step.SOURCE.why_not()
        assert "1 to 16 tokens, not 18" in str(step.why_not(torch.zeros(9, 2, 8)))
        assert "float32 and bfloat16" in str(step.why_not(torch.zeros(1, 1, 8).double()))
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in str(step.why_not(torch.zeros(1, 1, 8)))
    assert "gradient" in str(step.why_not(torch.zeros(1, 1, 8)))

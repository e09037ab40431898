"""Weights in 4 and 8 bits: near the old model, saved, loaded and cast, and as cheap as they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import landmark
from landmark.infer.generate import generate
from landmark.infer.sampling import Sampling
from landmark.models.decoder import Decoder
from landmark.models.inspect import count, figures, forward_flops
from landmark.nn.codes import CodedEmbedding, CodedExperts, CodedLinear
from landmark.nn.linear import Linear
from landmark.ops.quant.codes import Bits
from landmark.transforms.quantise import WAYS, quantise, quantised

SIZE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 101, "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
}  # fmt: skip


def llama(tied: bool = False) -> Decoder:
    torch.manual_seed(0)
    model = landmark.build({**SIZE, "tie_word_embeddings": tied}).eval()
    assert isinstance(model, Decoder)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.2)])
def test_logits_stay_near(bits: Bits, most: float, tied: bool) -> None:
    model = llama(tied)
    new = quantise(model, bits, outer=bits)
    assert isinstance(new, Decoder)
    left = [name for name, m in new.named_modules() if isinstance(m, Linear | nn.Embedding)]
    assert not left and isinstance(new.embed.tokens, CodedEmbedding)
    tokens = torch.randint(0, 101, (2, 20))
    with torch.no_grad():
        old, now = model(tokens), new(tokens)
        error = (now - old).square().mean().sqrt() / old.square().mean().sqrt()
        assert 0 < error < most
        loss = new.loss(new.hidden(tokens), tokens).loss
        want = torch.nn.functional.cross_entropy(new(tokens).flatten(0, 1), tokens.flatten(), reduction="sum")
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-3)
    assert count(new) == count(model) and forward_flops(new, 20) == forward_flops(model, 20)
    held = sum(b.nbytes for n, b in new.named_buffers() if n.endswith(("codes", "side")))
    shapes = [(m.rows, m.width) for m in new.modules() if isinstance(m, CodedLinear | CodedEmbedding)]
    assert held == sum(-(-rows // 32) * 32 * width * (bits + 0.5) / 8 for rows, width in shapes)  # whole pairs of tiles


def test_saved_loaded_and_cast(tmp_path: Path) -> None:
    new = quantise(llama(), 4)
    tokens = torch.randint(0, 101, (1, 9))
    landmark.save(new, tmp_path)
    with torch.no_grad():
        back = landmark.load(tmp_path)
        assert torch.equal(back(tokens), new(tokens))
        half = landmark.load(tmp_path, dtype="bfloat16")
        assert half(tokens).dtype == torch.bfloat16
        assert torch.equal(half(tokens), new.to(torch.bfloat16)(tokens))
    assert isinstance(back, Decoder)
    greedy = Sampling(temperature=0, max_tokens=5, stop_ids=())
    assert len(generate(back, [[1, 2, 3]], greedy)[0].tokens) == 5


@pytest.mark.parametrize("way", WAYS)
def test_what_it_costs_is_told(way: str) -> None:
    model = llama().bfloat16()
    told, of_plain = figures(quantised(model, way)), figures(model)
    for name in ("parameters", "embedding", "flops", "cache"):
        assert getattr(told, name) == getattr(of_plain, name)
    assert "coded" not in of_plain.memory and told.memory["coded"] < of_plain.memory["bfloat16"]


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("way", ["int8", "int4"])
def test_rounded_activations_cost_little_and_are_kept(way: str, tmp_path: Path) -> None:
    model = llama(tied=True)
    tokens = torch.randint(0, 101, (3, 50))
    plain, new = (quantised(model, name) for name in (way, f"{way}-a8"))
    with torch.no_grad():
        old, now, exact = plain(tokens), new(tokens), model(tokens)
        errors = [
            float((a - b).square().mean().sqrt() / b.square().mean().sqrt()) for a, b in ((now, old), (old, exact))
        ]
        assert 1e-4 < errors[0] < 0.02 and errors[0] < 2 * errors[1]
        assert torch.equal(new(tokens[1:2]), now[1:2])  # whatever else is in the batch
        landmark.save(new, tmp_path)
        back = landmark.load(tmp_path)
        assert torch.equal(back(tokens), now)
    assert isinstance(back, Decoder)
    assert {m.round_x for m in back.modules() if isinstance(m, CodedLinear)} == {True} and back.cfg.head.round_x


MIXTRAL = {
    **SIZE, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_experts_are_coded_too(way: str, tmp_path: Path) -> None:
    """Most of a sparse model's weights: near the old model, alike with few tokens and with many, saved and loaded."""
    torch.manual_seed(0)
    model = landmark.build(MIXTRAL).bfloat16().eval()
    new = quantised(model, way)
    assert isinstance(new, Decoder)
    stacks = [m for m in new.modules() if isinstance(m, CodedExperts)]
    assert len(stacks) == (0 if way == "bf16-11" else 6)
    assert count(new) == count(model) and forward_flops(new, 20) == forward_flops(model, 20)
    if stacks:
        held = sum(m.codes.nbytes + m.side.nbytes for m in stacks)
        assert held == sum(m.experts * m.rows * m.width for m in stacks) * (WAYS[way].bits + 0.5) / 8
        stacks[0].fill(weight := stacks[0].weight)
        assert far(stacks[0].weight.float(), weight.float()) < 0.01
    tokens = torch.randint(0, 101, (2, 100))
    with torch.no_grad():
        assert far(new(tokens).float(), model(tokens).float()) < (0.25 if "int4" in way else 0.06)
        landmark.save(new, tmp_path)
        back = landmark.load(tmp_path)
        assert torch.equal(back(tokens), new(tokens))
    assert isinstance(back, Decoder)
    greedy = Sampling(temperature=0, max_tokens=5, stop_ids=())
    together = generate(back, [[1, 2, 3], [5, 6, 7, 8]], greedy)
    alone = [generate(back, [prompt], greedy)[0] for prompt in ([1, 2, 3], [5, 6, 7, 8])]
    assert [o.tokens for o in together] == [o.tokens for o in alone]


def test_what_is_skipped_and_what_cannot_be() -> None:
    new = quantise(llama(), 8, outer=None, skip=("down",))
    assert isinstance(new, Decoder) and isinstance(new.embed.tokens, nn.Embedding)
    kinds = {name.rpartition(".")[2]: type(m) for name, m in new.named_modules() if isinstance(m, Linear | CodedLinear)}
    assert kinds["down"] is Linear and kinds["up"] is CodedLinear and kinds["linear"] is Linear
    with pytest.raises(ValueError, match="CodedLinear already"):
        quantise(new, 4)
    with pytest.raises(ValueError, match="did you mean 'int4'"):
        quantised(new, "int-4")
    with pytest.raises(ValueError, match=r"CodedLinear\.bits is 3"):
        CodedLinear.Config(bits=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_in_11_bits_loses_nothing(tied: bool, tmp_path: Path) -> None:
    model = llama(tied).bfloat16()
    new = quantised(model, "bf16-11")
    assert isinstance(new, Decoder) and isinstance(new.embed.tokens, CodedEmbedding)
    held = sum(b.nbytes for n, b in new.named_buffers() if n.endswith(("codes", "side")))
    assert held < count(model) * 1.5  # 1.4 in large matrices
    for name, module in new.named_modules():
        if isinstance(module, CodedLinear | CodedEmbedding):
            assert torch.equal(module.weight, model.state_dict()[f"{name}.weight"])
    tokens = torch.randint(0, 101, (2, 60))
    landmark.save(new, tmp_path)
    back = landmark.load(tmp_path)
    with torch.no_grad():
        old, now = model(tokens), new(tokens)
        assert torch.equal(back(tokens), now)
        exact = model.float()(tokens)  # both are as near to what the numbers say
        assert far(now, exact) < 1.2 * far(old, exact) < 0.02
    with pytest.raises(ValueError, match="load the model as bfloat16"):
        quantised(llama(), "bf16-11")
    with pytest.raises(ValueError, match="round_x goes with 4 or 8 bits"):
        CodedLinear.Config(bits=11, round_x=True)


def test_what_stands_beside_codes_has_any_length(tmp_path: Path) -> None:
    model = llama(tied=True).bfloat16()
    up = model.get_parameter(next(n for n in model.state_dict() if n.endswith("1.ffn.fn.up.weight")))
    with torch.no_grad():
        up.copy_(torch.randn(up.shape) * 4.0 ** torch.randint(-12, 13, up.shape))  # most exponents are in no table
    new = quantised(model, "bf16-11")
    module = next(m for n, m in new.named_modules() if n.endswith("1.ffn.fn.up"))
    assert isinstance(module, CodedLinear) and torch.equal(module.weight, up)
    with torch.device("meta"):
        empty = new.cfg.build()
    empty.load_state_dict(new.state_dict(), assign=True)  # of other lengths than it was built with
    tokens = torch.randint(0, 101, (2, 60))
    with torch.no_grad():
        old, now = model(tokens), new(tokens)
        assert torch.equal(empty.eval()(tokens), now)
        exact = model.float()(tokens)
        assert far(now, exact) < 1.2 * far(old, exact) < 0.05
    module.side[3] = -5
    landmark.save(new, tmp_path)
    with pytest.raises(ValueError, match=r"1\.ffn\.fn\.up\.side' does not say where the exponents of its .* begin"):
        landmark.load(tmp_path)

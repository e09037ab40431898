"""LoRA beside and in the weights of any model: attached is merged, rows of a batch differ, nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import landmark
from landmark.config import ModuleConfig
from landmark.models.decoder import Decoder
from landmark.nn.lora import Adapters, LoRA, linear_maps
from landmark.transforms.lora import Adapter, attach, check_rows, fresh, merge, taken, why_not
from landmark.transforms.quantise import quantise

from ..infer.mixers import MIXERS
from ..infer.models import LLAMA, build, every_family
from ..infer.test_engine import with_mixers
from ..models.families import close


def drawn(model: Any, seed: int = 0, rank: int = 3) -> Adapter:
    """A random adapter of all linear maps that can have one."""
    torch.manual_seed(seed)
    adapter = fresh(model, rank, 6.0, [name for name, m, _ in linear_maps(model) if why_not(name, m) is None])
    for low in adapter.factors.values():
        low.left = torch.randn_like(low.left) * 0.3
    return adapter


def tokens(model: Any, rows: int = 2, length: int = 11) -> Tensor:
    return torch.randint(0, model.cfg.embed.vocab, (rows, length), generator=torch.Generator().manual_seed(3))


def check_merged(model: Decoder, tolerance: float = 2e-5) -> None:
    adapter, text, merged = drawn(model), tokens(model), copy.deepcopy(model)
    merge(merged, adapter)
    with torch.no_grad():
        plain = model(text)
        adapters = attach(model, {"one": adapter})
        assert torch.equal(model(text), plain)
        with adapters.use("one"):
            close(model(text), merged(text), tolerance)
        assert (merged(text) - plain).abs().max() > 0.05 * plain.abs().max()


@pytest.mark.parametrize("architecture", every_family())
def test_every_family(architecture: str) -> None:
    model = build(every_family()[architecture])
    if isinstance(model, Decoder) and architecture != "BitNetForCausalLM":  # whose weights take no change up
        check_merged(model)


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer(name: str) -> None:
    mixers: tuple[ModuleConfig, ...] = MIXERS[name]
    check_merged(with_mixers(mixers).double(), 1e-10)


def llama() -> Decoder:
    model: Decoder = build(LLAMA)
    return model


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("coded", [False, True])
def test_rows_of_a_batch(coded: bool, grad: bool) -> None:
    """Each token goes through its own adapter, or none; beside coded weights too."""
    model: Any = llama()
    adapters = {"a": drawn(model, 1), "b": drawn(model, 2, rank=5)}
    model = quantise(model, 8) if coded else model
    chosen = attach(model, adapters)
    text = tokens(model, rows=5)
    with torch.set_grad_enabled(grad):
        wanted = {}
        for number, name in ((-1, None), (0, "a"), (1, "b")):
            with chosen.use(name):
                wanted[number] = model(text)
        numbers = [1, -1, 0, 0, 1]
        with chosen.rows((number, text.shape[1]) for number in numbers):
            assert len(chosen.groups) == 3
            got = model(text)
    for row, number in enumerate(numbers):
        close(got[row], wanted[number][row])
        assert all((got[row] - wanted[other][row]).abs().max() > 1e-3 for other in wanted if other != number)
    assert chosen.groups == ()


def test_all_rows_are_one_choice() -> None:
    chosen = attach(llama(), {})
    with chosen.rows([(-1, 3), (-1, 4)]):
        assert chosen.groups == ()
    chosen.names.append("a")
    with chosen.rows([(0, 3), (0, 4)]):
        assert chosen.groups == (("0", None),)
    with chosen.rows([(0, 3), (-1, 4)]):
        assert chosen.groups == (("0", slice(0, 3)),)


def test_without_a_choice_the_model_is_what_it_was() -> None:
    """Module by module, and bit by bit; with one, its linear maps are others."""
    model = llama()
    before, modules = model.state_dict(), dict(model.named_modules())
    adapters = attach(model, {"a": drawn(model)})
    assert attach(model, {"b": drawn(model, 1)}, to=adapters) is adapters and adapters.names == ["a", "b"]
    for name in ("a", None, "b", None):
        adapters.choose(name)
        assert (dict(model.named_modules()) == modules) == (name is None)
        assert any(isinstance(m, LoRA) for m in model.modules()) == (name is not None)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_learning(tmp_path: Path) -> None:
    """A fresh adapter changes nothing; only its factors learn; what they became can be had and attached elsewhere."""
    model = llama()
    text = tokens(model)
    plain = model(text).detach()
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    model.requires_grad_(False)
    adapters = attach(model, {"new": fresh(model, 4, 8.0, ["q", "v", "ffn.fn.down"])})
    adapters.choose("new")
    assert torch.equal(model(text), plain)
    own = [p for m in model.modules() if isinstance(m, LoRA) for p in m.factors.parameters()]
    assert len(own) == 2 * 3 * 3
    for p in own:
        p.requires_grad_(True)
    optimiser, losses = torch.optim.Adam(own, 0.02), []
    for _ in range(20):
        loss = model.loss(model.hidden(text[:, :-1]), text[:, 1:]).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]
    learnt, want = taken(adapters, "new"), model(text).detach()
    with pytest.raises(ValueError, match="an adapter is chosen"):
        landmark.save(model, tmp_path)
    adapters.choose(None)
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    merge(model, learnt)
    close(model(text).detach(), want)


def test_first_factors() -> None:
    """B is zero, A has the published bounds."""
    low = next(iter(fresh(llama(), 8, 16.0, ["q"]).factors.values()))
    assert not low.left.any() and low.scale == 2.0 and low.right.shape == (8, 32)
    assert 0.9 * 32**-0.5 < low.right.abs().max() <= 32**-0.5


def test_on_the_meta_device() -> None:
    """Shapes fit without weights."""
    with torch.device("meta"):
        model = landmark.build(LLAMA)
    adapter = drawn(llama())
    attach(model.eval(), {"a": adapter}).choose("a")
    assert all(m.factors["0"].A.is_meta for m in model.modules() if isinstance(m, LoRA))
    assert model(torch.zeros(1, 4, dtype=torch.long, device="meta")).shape == (1, 4, 97)


def test_complaints() -> None:
    model = llama()
    adapter = drawn(model)
    adapters = attach(model, {"a": adapter})
    with pytest.raises(ValueError, match=r"has an adapter 'a' already"):
        attach(model, {"a": adapter}, to=adapters)
    with pytest.raises(ValueError, match=r"no adapter 'b'.*; there are a"):
        adapters.choose("b")
    with pytest.raises(ValueError, match=r"'layers.0.attn.fn.w', which this model lacks"):
        attach(model, {"c": Adapter({"layers.0.attn.fn.w": next(iter(adapter.factors.values()))})})
    with pytest.raises(ValueError, match=r"'head.linear', which other layers read; merge it"):
        attach(model, {"c": fresh_head(model)})
    with pytest.raises(ValueError, match="no linear map is called 'qq'"):
        fresh(model, targets=["qq"])
    with pytest.raises(ValueError, match="the rank is 0"):
        fresh(model, 0)
    with pytest.raises(ValueError, match="no adapter 'x'; the model has none"):
        taken(Adapters(), "x")


def fresh_head(model: Decoder) -> Adapter:
    low = next(iter(drawn(model).factors.values()))
    return Adapter({"head.linear": low})


def test_learned_tokens_have_no_adapter_of_their_own() -> None:
    """A layer that reads more than tokens takes one adapter at a time, and says so."""
    model = with_mixers(MIXERS["memory as layer"])
    adapters = attach(model, {"a": drawn(model), "b": drawn(model, 1)})
    with torch.no_grad(), adapters.use("a"):
        model(tokens(model))
    with pytest.raises(ValueError, match="a layer reads 3 rows where there are 2 tokens"):
        check_rows(model, adapters)

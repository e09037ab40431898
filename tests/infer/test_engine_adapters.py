"""Several adapters of one model in one batch: a request's tokens are those of its adapter, merged, running alone."""

from __future__ import annotations

import copy
import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from landmark.infer.engine import Engine, Request, Sampling
from landmark.models.decoder import Decoder
from landmark.nn.lora import LoRA, linear_maps
from landmark.transforms.lora import Adapters, attach, fresh, merge, why_not
from landmark.transforms.quantise import quantise

from .mixers import MIXERS
from .test_engine import alone, empty, model, requests, tight, with_mixers

NAMES = (None, "a", "b")
KINDS = ["llama", "gemma", "recurrence and attention", "mamba-2 and attention", "rwkv-4"]


@functools.cache
def adapted(kind: str) -> tuple[Decoder, Adapters, dict[str | None, Decoder]]:
    """A model with two adapters beside its weights, and a model each with one merged."""
    base = with_mixers(MIXERS[kind]) if kind in MIXERS else copy.deepcopy(model(kind))
    merged: dict[str | None, Decoder] = {None: copy.deepcopy(base)}
    adapters = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        ends = [end for end, m, _ in linear_maps(base) if why_not(end, m) is None]
        adapters[name] = fresh(base, 2 + seed, 8.0, ends if seed else ends[::2])
        for low in adapters[name].factors.values():
            low.left = torch.randn_like(low.left) * 0.3
        merged[name] = copy.deepcopy(base)
        merge(merged[name], adapters[name])
    return base, attach(base, adapters), merged


def asked(kind: str, **options: Any) -> list[Request]:
    """Requests whose beginnings are shared between adapters, too."""
    of = adapted(kind)[0]
    return [replace(r, adapter=NAMES[n % 4 % 3]) for n, r in enumerate(requests(of.cfg.embed.vocab, **options))]


@functools.cache
def wanted(kind: str) -> list[list[int]]:
    return [alone(adapted(kind)[2][request.adapter], request) for request in asked(kind)]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_running_alone(kind: str) -> None:
    of, adapters, _ = adapted(kind)
    engine = Engine(of, memory=1 << 24, max_batch=5, chunk=24, block=8, interval=16, adapters=adapters)
    assert [a[0].tokens for a in engine.generate(asked(kind))] == wanted(kind)
    again = [a[0].tokens for a in engine.generate(asked(kind))]  # where all is remembered
    assert again == wanted(kind) and engine.stats().cached_tokens > 40 and empty(engine)
    assert len({tuple(tokens) for tokens in wanted(kind)}) == len(wanted(kind))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_who_gave_way_goes_on_with_the_same_tokens(kind: str) -> None:
    of, adapters, _ = adapted(kind)
    engine = tight(of, 152, max_batch=8, chunk=24, block=8, adapters=adapters)
    assert [a[0].tokens for a in engine.generate(asked(kind))] == wanted(kind)
    assert engine.stats().preempted > 0 and empty(engine)


@pytest.mark.parametrize("kind", ["llama", "mamba-2 and attention"])
def test_guesses(kind: str) -> None:
    of, adapters, _ = adapted(kind)
    engine = Engine(of, memory=1 << 24, max_batch=5, chunk=24, block=8, adapters=adapters, drafter="lookup")
    assert [a[0].tokens for a in engine.generate(asked(kind))] == wanted(kind)
    assert engine.stats().proposed > 0 and empty(engine)


@pytest.mark.parametrize("kind", ["llama", "recurrence and attention", "rwkv-4"])
def test_nothing_that_another_adapter_read_is_used(kind: str) -> None:
    of, adapters, _ = adapted(kind)
    engine = Engine(of, memory=1 << 24, max_batch=5, chunk=64, block=8, interval=16, adapters=adapters)
    prompt = torch.randint(0, 97, (64,), generator=torch.Generator().manual_seed(5)).tolist()
    first, second = {}, {}
    for found, name in itertools.product((first, second), NAMES):
        handle = engine.submit(Request(prompt=prompt, adapter=name, sampling=Sampling(temperature=0, max_tokens=2)))
        handle.result()
        found[name] = handle.cached
    assert set(first.values()) == {0} and all(n >= 48 for n in second.values())


def test_answers_of_one_request_share_its_adapter() -> None:
    of, adapters, merged = adapted("llama")
    engine = Engine(of, memory=1 << 24, max_batch=5, chunk=24, block=8, adapters=adapters)
    sampling = Sampling(temperature=1.0, seed=3, max_tokens=9, stop_ids=())
    request = Request(prompt=list(range(30)), sampling=sampling, n=3, adapter="b", prompt_logprobs=0)
    other = engine.submit(replace(request, adapter=None, n=1))
    handle = engine.submit(request)
    for n, answer in enumerate(handle.result()):
        alike = replace(request, sampling=replace(sampling, seed=3 + n), n=1, prompt_logprobs=None)
        assert answer.tokens == alone(merged["b"], alike)
    other.result()
    with torch.no_grad():
        logits = merged["b"](torch.tensor([request.prompt]))[0].log_softmax(1)
    scored = [p for (_, p), _ in handle.prompt_logprobs]
    torch.testing.assert_close(
        torch.tensor(scored), logits[torch.arange(29), torch.arange(1, 30)], rtol=1e-4, atol=1e-4
    )


def test_beside_coded_weights() -> None:
    of, _, _ = adapted("llama")
    coded: Any = quantise(model("llama"), 8)
    torch.manual_seed(0)
    factors = fresh(coded, 3, 9.0, ["q", "down"])
    for low in factors.factors.values():
        low.left = torch.randn_like(low.left) * 0.3
    adapters = attach(coded, {"x": factors})
    engine = Engine(coded, memory=1 << 24, max_batch=4, chunk=24, block=8, adapters=adapters)
    wishes = [replace(r, adapter="x" if n % 2 else None) for n, r in enumerate(requests(97, 6, 20, 30))]
    got = [a[0].tokens for a in engine.generate(wishes)]
    for request, tokens in zip(wishes, got, strict=True):
        with adapters.use(request.adapter):
            assert alone(coded, request) == tokens
    assert isinstance(of, Decoder)


def test_a_crash_leaves_no_choice_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    of, adapters, merged = adapted("llama")
    engine = Engine(of, memory=1 << 24, max_batch=5, chunk=24, block=8, adapters=adapters)
    sampling = Sampling(temperature=0, max_tokens=4, stop_ids=())
    layer = of.layers[1]

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", broken)
        handle = engine.submit(Request(prompt=[1, 2, 3], sampling=sampling, adapter="a"))
        engine.step()
        assert handle.error is not None
    assert adapters.groups == ()
    request = Request(prompt=[1, 2, 3], sampling=sampling, adapter="b")
    assert engine.submit(request).result()[0].tokens == alone(merged["b"], request)


def test_complaints() -> None:
    of, adapters, _ = adapted("llama")
    with pytest.raises(ValueError, match="there is no adapter 'c'; there are a, b"):
        Engine(of, memory=1 << 24, adapters=adapters).submit(Request(prompt=[1], adapter="c"))
    with pytest.raises(ValueError, match="there is no adapter 'a'; the model has none"):
        Engine(model("llama"), memory=1 << 24).submit(Request(prompt=[1], adapter="a"))
    assert not any(isinstance(m, LoRA) for m in of.modules())  # nobody uses one at present

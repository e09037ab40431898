"""Speculation inside the engine: every answer is what it is without, and the model is called less often."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from landmark.infer.constrain import Forms
from landmark.infer.engine import Answer, Engine, Request, Sampling
from landmark.infer.engine.drafts import Lookup
from landmark.infer.speculative.pace import MOST, Cost, Pace
from landmark.models.decoder import Decoder
from landmark.models.pattern import pattern

from ..models.families import perturb
from ..nn.test_mtp import small
from .models import LLAMA, build, speaker, tokenizer
from .test_engine import empty, model, requests, tight
from .test_own_drafts import counting

OPTIONS: dict[str, Any] = {"max_batch": 5, "chunk": 24, "block": 8}


def hybrid() -> Decoder:
    torch.manual_seed(0)
    made: Any = pattern("mamba2 + attention", dim=32, vocab=97).build().eval()
    perturb(made)
    return made


def of(name: str) -> Decoder:
    return hybrid() if name == "hybrid" else model(name)


def repetitive(vocab: int, count: int = 8) -> list[Request]:
    """Of all samplings; hot ones refuse most guesses, and those that lean to some tokens keep many."""
    lean = {3: 6.0, 5: 6.0, 7: 5.0}
    found = []
    for n, asked in enumerate(requests(vocab, count)):
        prompt = [*asked.prompt, *([3, 5, 7, 3, 5, 5] * 4)]
        sampling = replace(asked.sampling, max_tokens=40, logit_bias=lean if n % 2 else asked.sampling.logit_bias)
        logprobs: Any = (None, "model", "sampled")[n % 3]
        found.append(replace(asked, prompt=prompt, sampling=sampling, logprobs=logprobs, top=2 if logprobs else 0))
    return found


def answers(engine: Engine, asked: list[Request]) -> list[list[Answer]]:
    got = engine.generate(asked)
    assert engine.stats().failed == engine.stats().crashes == 0 and empty(engine)
    return got


def same(ours: list[list[Answer]], theirs: list[list[Answer]]) -> None:
    for some, others in zip(ours, theirs, strict=True):
        for our, their in zip(some, others, strict=True):
            assert (our.tokens, our.text, our.finish) == (their.tokens, their.text, their.finish)
            assert (our.logprobs is None) == (their.logprobs is None)
            if our.logprobs is not None:
                assert our.logprobs == pytest.approx(their.logprobs, abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "window", "gemma", "hybrid", "recurrence", "mamba-2 and attention"])
def test_answers_are_the_same_in_fewer_steps(name: str) -> None:
    asked = repetitive(of(name).cfg.embed.vocab)
    plain, ahead = (
        Engine(of(name), memory=1 << 24, **OPTIONS),
        Engine(of(name), memory=1 << 24, drafter="lookup", **OPTIONS),
    )
    same(answers(ahead, asked), answers(plain, asked))
    stats = ahead.stats()
    assert 0 < stats.kept < stats.proposed and stats.steps < plain.stats().steps
    assert plain.stats().proposed == 0 and stats.new_tokens == plain.stats().new_tokens


@pytest.mark.parametrize("name", ["llama", "window", "hybrid"])
def test_giving_way_and_remembered_beginnings(name: str) -> None:
    """The least memory for one sequence, so that the others have to give way; then everything once more."""
    asked = [replace(r, n=1 + (i == 1)) for i, r in enumerate(repetitive(of(name).cfg.embed.vocab, 6))]
    longest = max(len(r.prompt) + r.sampling.max_tokens for r in asked)
    plain = Engine(of(name), memory=1 << 24, **OPTIONS)
    want = answers(plain, asked)
    ahead = tight(of(name), longest, drafter="lookup", **OPTIONS)
    same(answers(ahead, asked), want)
    assert ahead.stats().kept > 0
    if name != "window":
        assert ahead.stats().preempted > 0
    again = Engine(of(name), memory=1 << 24, drafter="lookup", **OPTIONS)
    same(answers(again, asked), want)
    same(answers(again, asked), want)
    assert again.stats().cached_tokens > 0


def test_guides_and_stop_strings() -> None:
    words = tokenizer()
    forms = Forms(words, speaker().cfg.head.vocab, (words.eos_id,))  # type: ignore[arg-type]
    numbers = {"type": "array", "items": {"enum": [True, False]}, "minItems": 3, "maxItems": 3}
    prompt = words.encode("[true,false,true]")
    asked = [
        Request(prompt=prompt, sampling=Sampling(seed=n, temperature=0.5 * n, max_tokens=60), guide=guide)
        for n in range(3)
        for guide in (forms.json_schema(numbers), None)
    ]
    likely = {token: 9.0 for token in words.encode("false, true")}
    asked += [
        Request(
            prompt=prompt,
            sampling=Sampling(seed=n, max_tokens=60, stop=("e", "tr"), stop_ids=(), logit_bias=likely),
            best_of=2,
        )
        for n in range(4)
    ]
    plain, ahead = Engine(speaker(), words, memory=1 << 24), Engine(speaker(), words, memory=1 << 24, drafter="lookup")
    want = answers(plain, asked)
    got = answers(ahead, asked)
    same(got, want)
    for n in (0, 2, 4):
        assert len(json.loads(got[n][0].text or "")) == 3
    assert any(a.finish == "stop" for several in got[6:] for a in several) and ahead.stats().kept > 0


def test_who_leaves_early() -> None:
    engine = Engine(model("llama"), memory=1 << 24, drafter="lookup", **OPTIONS)
    handles = [engine.submit(r) for r in repetitive(97)]
    for n in range(6):
        engine.step()
        handles[n].cancel()
    kept = [handle.result()[0].tokens for handle in handles[6:]]
    plain = Engine(model("llama"), memory=1 << 24, **OPTIONS)
    assert kept == [a[0].tokens for a in plain.generate(repetitive(97)[6:])] and empty(engine)


def near(original: Decoder, noise: float = 0.02) -> Decoder:
    """A draft model that agrees with it on many tokens."""
    draft = original.cfg.build().to(original.dtype).eval()
    draft.load_state_dict(original.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += noise * weight.std() * torch.randn_like(weight) if weight.numel() > 1 else 0
    return draft


def cheap(engine: Engine) -> Engine:
    """As if the model that drafts were a tenth of the size."""
    engine._scheduler._cost = Cost(guess=0.1)
    return engine


@pytest.mark.parametrize("drafted", ["llama", "window", "hybrid", "recurrence", "mamba-2 and attention"])
@pytest.mark.parametrize("name", ["llama", "hybrid"])
def test_a_model_drafts(name: str, drafted: str) -> None:
    """Every kind of state of the model and of the one that drafts, with samplings of all kinds."""
    target = of(name)
    draft = near(target) if name == drafted else of(drafted)
    asked = repetitive(target.cfg.embed.vocab, 4)
    plain = Engine(target, memory=1 << 24, **OPTIONS)
    ahead = cheap(Engine(target, memory=1 << 25, drafter=draft, **OPTIONS))
    same(answers(ahead, asked), answers(plain, asked))
    stats = ahead.stats()
    assert 0 < stats.kept < stats.proposed and stats.new_tokens == plain.stats().new_tokens
    if name == drafted:
        assert stats.kept > 0.5 * stats.proposed and stats.steps < plain.stats().steps
    drafts: Any = ahead._scheduler.drafter
    pools = [group.pool for group in drafts.store.groups] + [p for p in [drafts.store.slot_pool] if p is not None]
    assert not drafts._followers and all(pool.available == pool.count for pool in pools)


@pytest.mark.parametrize("name", ["llama", "hybrid"])
def test_the_model_itself_is_always_right(name: str) -> None:
    """Drawn by the same numbers: hot samplings too, whose guesses of the likeliest token would mostly be wrong."""
    target = of(name)
    asked = [
        Request(prompt=[3, 4, n], sampling=Sampling(temperature=1.5, seed=n, max_tokens=24, stop_ids=()))
        for n in range(2)
    ]
    plain, ahead = Engine(target, memory=1 << 24), cheap(Engine(target, memory=1 << 24, drafter=target))
    same(answers(ahead, asked), answers(plain, asked))
    stats = ahead.stats()
    assert stats.kept >= 0.97 * stats.proposed > 20 and stats.steps < 0.5 * plain.stats().steps


@pytest.mark.parametrize("name", ["llama", "hybrid"])
def test_a_model_drafts_for_those_that_give_way(name: str) -> None:
    asked = [replace(r, n=1 + (i == 1)) for i, r in enumerate(repetitive(of(name).cfg.embed.vocab, 6))]
    plain = Engine(of(name), memory=1 << 24, **OPTIONS)
    want = answers(plain, asked)
    again = cheap(Engine(of(name), memory=1 << 24, drafter=near(of(name)), **OPTIONS))
    same(answers(again, asked), want)
    same(answers(again, asked), want)
    assert again.stats().cached_tokens > 0
    longest = max(len(r.prompt) + r.sampling.max_tokens for r in asked)
    scarce = cheap(tight(of(name), 2 * longest, drafter=near(of(name)), **OPTIONS))
    same(answers(scarce, asked), want)
    assert scarce.stats().kept > 0


def test_a_model_drafts_within_forms() -> None:
    words = tokenizer()
    forms = Forms(words, speaker().cfg.head.vocab, (words.eos_id,))  # type: ignore[arg-type]
    numbers = {"type": "array", "items": {"enum": [True, False]}, "minItems": 3, "maxItems": 3}
    asked = [
        Request(
            prompt=words.encode("[true,"), sampling=Sampling(seed=n, max_tokens=60), guide=forms.json_schema(numbers)
        )
        for n in range(3)
    ]
    plain, ahead = (
        Engine(speaker(), words, memory=1 << 24),
        cheap(Engine(speaker(), words, memory=1 << 24, drafter=speaker())),
    )
    got = answers(ahead, asked)
    same(got, answers(plain, asked))
    assert all(len(json.loads(one.text or "")) == 3 for several in got for one in several)
    assert ahead.stats().kept > 0


@pytest.mark.parametrize("mixer", ["attention", "window", "latent", "mamba2"])
@pytest.mark.parametrize("kind", ["sequential", "independent"])
def test_own_drafts(kind: str, mixer: str) -> None:
    target = small(kind, 2, mixer)
    asked = repetitive(target.cfg.embed.vocab, 4)
    plain, ahead = (Engine(target, memory=1 << 24, drafter=d, **OPTIONS) for d in (None, "own"))  # type: ignore[arg-type]
    want = answers(plain, asked)
    same(answers(ahead, asked), want)
    same(answers(ahead, asked), want)
    assert ahead.stats().proposed > 0
    drafts: Any = ahead._scheduler.drafter
    assert not drafts._heard and not drafts._draftings


@pytest.mark.parametrize("kind", ["sequential", "independent"])
def test_own_drafts_that_have_learned(kind: str) -> None:
    target = counting(kind)
    asked = [Request(prompt=[3, 4, 5], sampling=Sampling(temperature=0, max_tokens=18, stop_ids=()))]
    engine = Engine(target, memory=1 << 24, drafter="own")
    assert answers(engine, asked)[0][0].tokens == [(6 + n) % 7 for n in range(18)]
    assert engine.stats().kept >= 0.8 * engine.stats().proposed and engine.stats().steps < 12


def test_who_leaves_a_model_that_drafts_early() -> None:
    engine = cheap(Engine(model("llama"), memory=1 << 24, drafter=near(model("llama")), **OPTIONS))
    handles = [engine.submit(r) for r in repetitive(97)]
    for n in range(6):
        engine.step()
        handles[n].cancel()
    kept = [handle.result()[0].tokens for handle in handles[6:]]
    plain = Engine(model("llama"), memory=1 << 24, **OPTIONS)
    assert kept == [a[0].tokens for a in plain.generate(repetitive(97)[6:])] and empty(engine)
    assert not engine._scheduler.drafter._followers  # type: ignore[union-attr]


def test_a_crowd_does_not_speculate() -> None:
    target = model("llama")
    asked = [Request(prompt=[n, 3, 4], sampling=Sampling(temperature=0, max_tokens=8)) for n in range(40)]
    engine = Engine(target, memory=1 << 25, max_batch=40, drafter=target)
    engine.generate(asked)
    assert engine.stats().proposed == 0  # it costs as much as it gives
    engine = Engine(target, memory=1 << 25, max_batch=40, drafter="lookup")
    engine.generate(asked)
    assert engine.stats().proposed == 0


def test_guesses() -> None:
    lookup = Lookup()
    assert lookup.guess([1, 2, 3, 4], 8) == []
    assert lookup.guess([1, 2, 3, 4, 9, 1, 2], 3) == [3, 4, 9]
    text = [1, 2, 3, 4, 9, 1, 2, 3, 4, 9, 1]
    assert lookup.guess(text, 7) == [2, 3, 4, 9, 1, 2, 3]  # round and round
    assert lookup.guess([*text, 5, 5, 5], 2) == [5, 5] and lookup.guess([*text, 5, 5, 5], 0) == []


def test_pace() -> None:
    alone = Cost().needed(1)
    pace = Pace()
    assert pace.ahead(10, alone) == 6  # 0.7 ** 6 > 1 / 9 > 0.7 ** 7
    for _ in range(30):
        pace.judge(8, 8, 10)
    assert pace.ahead(10, alone) == MOST
    pauses, length = [], 14
    for _ in range(9):
        pace.judge(1, 0, length)
        pause = 0
        while not pace.ahead(length + pause, alone):
            pause += 1
        pauses.append(pause)
        length += pause
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert pace.ahead(length, alone) == 1 or pace.rate > alone
    needed = [Cost().needed(n) for n in (1, 4, 16, 64)]
    assert needed == sorted(needed) and needed[0] == pytest.approx(1 / 9) and needed[-1] > 0.7
    assert Cost(guess=0.2).needed(4) == pytest.approx(Cost().needed(4) + 0.2)
    assert Pace().ahead(10, Cost().needed(64)) == 0


def test_what_cannot_be() -> None:
    def engine(drafter: Any) -> Engine:
        return Engine(model("llama"), memory=1 << 24, drafter=drafter)

    with pytest.raises(ValueError, match="drafter is 'model'; give 'lookup', 'own', a decoder"):
        engine("model")
    with pytest.raises(ValueError, match="vocabulary of 50, the model one of 97"):
        engine(build(LLAMA | {"vocab_size": 50}))
    with pytest.raises(ValueError, match="in training mode"):
        engine(near(model("llama")).train())
    with pytest.raises(ValueError, match="this model has no drafts"):
        engine("own")

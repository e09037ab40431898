"""Speculation inside the engine: every answer is what it is without, and the model is called less often."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from landmark.infer.constrain import Forms
from landmark.infer.engine import Answer, Engine, Request, Sampling
from landmark.infer.engine.drafts import MOST, Lookup
from landmark.models.decoder import Decoder
from landmark.models.pattern import pattern

from ..models.families import perturb
from .models import speaker, tokenizer
from .test_engine import empty, model, requests, tight

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


def test_guesses() -> None:
    lookup = Lookup()
    assert lookup.guess([1, 2, 3, 4], 8) == []
    assert lookup.guess([1, 2, 3, 4, 9, 1, 2], 3) == [3, 4, 9]
    text = [1, 2, 3, 4, 9, 1, 2, 3, 4, 9, 1]
    lookup.judge(3, 3, len(text))
    assert lookup.length == 2 * 4 == MOST
    assert lookup.guess(text, 7) == [2, 3, 4, 9, 1, 2, 3]  # round and round
    assert lookup.guess([*text, 5, 5, 5], 2) == [5, 5] and lookup.guess([*text, 5, 5, 5], 0) == []
    lookup.judge(2, 1, 14)
    assert lookup.length == 1
    pauses = []
    length = 14
    for _ in range(9):
        lookup.judge(1, 0, length)
        pause = 0
        while not lookup.guess([5] * (length + pause), 1):
            pause += 1
        pauses.append(pause)
        length += pause
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 64, 64]


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="drafter is 'model'; the engine can draft by lookup"):
        Engine(model("llama"), memory=1 << 24, drafter="model")  # type: ignore[arg-type]

"""Speculative decoding: equal where greedy, equal in distribution where not, for every kind of state and settings."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from scipy import stats

import landmark
from landmark.infer.constrain import Forms
from landmark.infer.generate import generate
from landmark.infer.sampling import Sampling
from landmark.infer.speculative import (
    Figures,
    Lookup,
    ModelDrafter,
    expected_tokens,
    speculate,
    verify,
)  # fmt: skip
from landmark.models.decoder import Decoder
from landmark.models.pattern import pattern

from ..models.families import perturb
from .models import LLAMA, build, llama, speaker, tokenizer

PROMPTS = [[5, 6, 7, 8, 5, 6], [9, 10, 11], [3] * 12, [20, 21, 20, 21, 20]]


def answers(model: Decoder, prompts: list[list[int]], sampling: Any, **how: Any) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in prompts]
    for event in speculate(model, prompts, sampling, **how):
        out[event.index].append(event.token)
    return out


def plain(model: Decoder, prompts: list[list[int]], sampling: Any) -> list[list[int]]:
    return [answer.tokens for answer in generate(model, prompts, sampling)]


def small() -> Decoder:
    """A drafter that agrees with `llama()` on some tokens: the same weights with one layer less."""
    model = llama()
    draft: Decoder = build(LLAMA | {"num_hidden_layers": 2})
    draft.load_state_dict({name: w for name, w in model.state_dict().items() if name in draft.state_dict()})
    return draft


@pytest.mark.parametrize("length", [1, 3, 7, None])
@pytest.mark.parametrize("drafter", ["lookup", "model", "itself"])
def test_greedy_answers_are_the_same(drafter: str, length: int | None) -> None:
    model = llama()
    makes: dict[str, Any] = {
        "lookup": Lookup, "model": lambda: ModelDrafter(small()), "itself": lambda: ModelDrafter(model)
    }  # fmt: skip
    settings = [Sampling(temperature=0, max_tokens=n, stop_ids=()) for n in (20, 7, 1, 30)]
    figures = Figures()
    got = answers(model, PROMPTS, settings, drafter=makes[drafter](), length=length, figures=figures)
    assert got == plain(model, PROMPTS, settings)
    if drafter == "itself":
        assert length is None or (figures.acceptance == 1.0 and figures.calls < figures.tokens)


@pytest.mark.parametrize("parts", ["2*window", "mamba2 + attention", "rwkv7", "mamba", "ttt", "2*latent"])
def test_every_kind_of_state_rolls_back(parts: str) -> None:
    torch.manual_seed(0)
    own = {"window": {"window": 6}} if "window" in parts else {}
    model: Any = pattern(parts, dim=32, vocab=97, parts=own).build().eval()
    perturb(model)
    prompts = [[5, 6, 7, 8, 5, 6], [9, 10, 11]]
    sampling = Sampling(temperature=0, max_tokens=14, stop_ids=())
    want = plain(model, prompts, sampling)
    assert answers(model, prompts, sampling, drafter=Lookup(), length=3) == want
    assert answers(model, prompts, sampling, drafter=ModelDrafter(small()), length=4) == want
    assert answers(small(), prompts, sampling, drafter=ModelDrafter(model), length=4) == plain(
        small(), prompts, sampling
    )


def test_verification_keeps_the_distribution() -> None:
    """100,000 draws of one step, chi-squared; of drawn and of chosen proposals, at every number that is kept."""
    generator = torch.Generator().manual_seed(0)
    n, k, vocab = 100_000, 3, 8
    p = torch.rand(k + 1, vocab, generator=generator).pow(2)
    q = torch.rand(k, vocab, generator=generator).pow(2)
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    for drawn in (True, False):
        drafts = torch.multinomial(q, n, replacement=True, generator=generator).T
        if not drawn:
            drafts = torch.tensor([1, 2, 3]).expand(n, -1)
        uniform = torch.rand(n, k + 1, generator=generator, dtype=torch.float64)
        counts, tokens = verify(p.expand(n, -1, -1), q.expand(n, -1, -1) if drawn else None, drafts, uniform)
        said = torch.cat([drafts, torch.zeros(n, 1, dtype=torch.long)], 1)
        said[torch.arange(n), counts] = tokens
        for place in range(k + 1):
            there = said[counts >= place, place]
            seen = torch.bincount(there, minlength=vocab).numpy()
            want = p[place].double() / p[place].double().sum() * seen.sum()
            assert stats.chisquare(seen, want.numpy()).pvalue > 1e-3


def test_the_expected_length() -> None:
    """(1 - a^(g + 1)) / (1 - a) to 2%, where every place has the same two distributions."""
    generator = torch.Generator().manual_seed(1)
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    a = torch.minimum(p, q).sum().item()
    for g in (1, 3, 7):
        n = 50_000
        drafts = torch.multinomial(q.expand(g, -1), n, replacement=True, generator=generator).T
        uniform = torch.rand(n, g + 1, generator=generator, dtype=torch.float64)
        counts, _ = verify(p.expand(n, g + 1, 3), q.expand(n, g, 3), drafts, uniform)
        assert abs((counts + 1).double().mean().item() / expected_tokens(a, g) - 1) < 0.02
    assert expected_tokens(1.0, 4) == 5 and expected_tokens(0.0, 4) == 1


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "top_k": 6}, {"top_p": 0.8, "frequency_penalty": 0.5}])
@pytest.mark.parametrize("drafter", ["lookup", "model"])
def test_sampled_answers_have_the_distribution_of_plain_ones(drafter: str, settings: dict[str, Any]) -> None:
    """Pairs of tokens, drawn with and without speculation, chi-squared of homogeneity."""
    tiny = LLAMA | {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    model, draft = build(tiny), build(tiny, seed=1)
    n = 3000
    prompts = [[1, 2, 3, 1, 2]] * n
    drawn = [Sampling(seed=s, max_tokens=3, stop_ids=(), **settings) for s in range(n)]
    how = Lookup() if drafter == "lookup" else ModelDrafter(draft)
    ours = answers(model, prompts, drawn, drafter=how, length=2)
    other = [Sampling(seed=n + s, max_tokens=3, stop_ids=(), **settings) for s in range(n)]
    theirs = plain(model, prompts, other)
    table = torch.zeros(2, 12 * 12)
    for row, said in ((0, ours), (1, theirs)):
        for tokens in said:
            table[row, tokens[1] * 12 + tokens[2]] += 1
    often = table.sum(0) >= 10
    counts = torch.cat([table[:, often], table[:, ~often].sum(1, keepdim=True) + 1e-9], 1)
    assert stats.chi2_contingency(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("drafter", ["lookup", "model"])
def test_forms_are_kept(drafter: str) -> None:
    model, words = speaker(), tokenizer()
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
    }
    forms = Forms(words, model.cfg.head.vocab, (words.eos_id,))  # type: ignore[arg-type]
    prompts = [words.encode("def f(a, b):"), words.encode("return")]
    how = Lookup() if drafter == "lookup" else ModelDrafter(model)
    guides = [forms.json_schema({**schema, "additionalProperties": False})(), None]
    texts = ["", ""]
    sampling = Sampling(seed=3, max_tokens=40)
    for event in speculate(model, prompts, sampling, drafter=how, tokenizer=words, length=4, guides=guides):
        texts[event.index] += event.text
    assert set(json.loads(texts[0])) == {"a", "b"}


def test_what_cannot_take_part() -> None:
    other = build(LLAMA | {"vocab_size": 50})
    with pytest.raises(ValueError, match="vocabulary of 50, the model one of 97"):
        answers(llama(), [[1]], Sampling(), drafter=ModelDrafter(other))
    with pytest.raises(ValueError, match="propose at least 1"):
        answers(llama(), [[1]], Sampling(), drafter=Lookup(), length=0)
    with pytest.raises(ValueError, match="look for at least 1"):
        Lookup(0)
    with pytest.raises(ValueError, match="in training mode"):
        ModelDrafter(landmark.build(LLAMA).train())  # type: ignore[arg-type]

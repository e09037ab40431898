"""A model that speculates with its own modules for further tokens: the same answers, in fewer calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

from landmark.infer.generate import generate
from landmark.infer.sampling import Sampling
from landmark.infer.speculative import Figures, OwnDrafts, speculate
from landmark.models.decoder import Decoder
from landmark.objectives.mtp import MultiToken

from ..models.families import perturb
from ..nn.test_mtp import of_the_whole, small
from ..objectives.test_mtp import batch

PROMPTS = [[5, 6, 7, 8, 5, 6], [9, 10, 11], [3], [20, 21, 20, 21, 20]]


def answers(model: Decoder, prompts: list[list[int]], sampling: Any, **how: Any) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in prompts]
    for event in speculate(model, prompts, sampling, drafter=OwnDrafts(), **how):
        out[event.index].append(event.token)
    return out


@pytest.mark.parametrize("mixer", ["attention", "window", "latent", "mamba2"])
@pytest.mark.parametrize("kind", ["sequential", "independent"])
def test_greedy_answers_are_the_same(kind: str, mixer: str) -> None:
    model = small(kind, 2, mixer)
    settings = [Sampling(temperature=0, max_tokens=n, stop_ids=()) for n in (20, 7, 1, 16)]
    want = [answer.tokens for answer in generate(model, PROMPTS, settings)]
    for length in (1, 2, 5, None):
        assert answers(model, PROMPTS, settings, length=length) == want


def counting(kind: str) -> Decoder:
    """A model that has learned to count in sevens, and its drafts with it."""
    torch.manual_seed(0)
    model = small(kind, 2, "attention").float().train()
    perturb(model, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        starts = torch.randint(0, 7, (8, 1), generator=generator)
        tokens = (starts + torch.arange(16)) % 7
        loss = MultiToken(weight=1.0).loss(model, batch(tokens, torch.ones_like(tokens))).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.double().eval()


@pytest.mark.parametrize("kind", ["sequential", "independent"])
@torch.inference_mode()
def test_what_is_kept(kind: str) -> None:
    """Trained drafts are right; what is kept is what drafts that see the whole text, with no state, would have said."""
    with torch.inference_mode(False):
        model = counting(kind)
    prompts, said = [[3, 4, 5], [0, 2, 4, 6]], 18
    figures = Figures()
    greedy = Sampling(temperature=0, max_tokens=said, stop_ids=())
    got = answers(model, prompts, greedy, length=2, figures=figures)
    assert got[0] == [(6 + i) % 7 for i in range(said)]
    kept = 0
    for prompt, answer in zip(prompts, got, strict=True):
        at = 1  # tokens of the answer that are certain
        while at < said:
            text, proposed = [*prompt, *answer[:at]], list[int]()
            for k in range(min(2, said - at)):
                proposed.append(int(of_the_whole(model, text, [*proposed, *[0] * (2 - k)])[k].argmax()))
            right = [a == b for a, b in zip(proposed, answer[at:], strict=False)]
            count = right.index(False) if False in right else len(right)
            kept, at = kept + count, at + count + 1
    assert figures.kept == kept and figures.acceptance > 0.8
    assert figures.calls < said / 2


def test_draws_are_those_of_the_model() -> None:
    """Three tokens of six, drawn with drafts and without, by other seeds: chi-squared over all triples."""
    model = small("sequential", 2, "attention").float()
    only = {token: -100.0 for token in range(6, 61)}
    settings = [Sampling(logit_bias=only, max_tokens=3, seed=seed, stop_ids=()) for seed in range(3000)]
    drawn = answers(model, [[5, 6]] * len(settings), settings, length=2)
    other = [replace(one, seed=10**6 + seed) for seed, one in enumerate(settings)]
    plain = [answer.tokens for answer in generate(model, [[5, 6]] * len(other), other)]
    tables = [torch.zeros(216), torch.zeros(216)]
    for table, rows in zip(tables, (drawn, plain), strict=True):
        for a, b, c in rows:
            table[a * 36 + b * 6 + c] += 1
    common = (tables[0] + tables[1]) >= 10
    both = torch.stack([torch.cat([t[common], t[~common].sum()[None]]) for t in tables]).numpy()
    assert stats.chi2_contingency(both[:, both.sum(0) > 0]).pvalue > 1e-3


def test_a_model_without_drafts() -> None:
    model = replace(small("sequential", 1, "attention").cfg, drafts=None).build().eval()
    with pytest.raises(ValueError, match="this model has no drafts"):
        answers(model, [[1, 2]], Sampling(temperature=0, max_tokens=2))

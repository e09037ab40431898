"""lm-evaluation-harness over HTTP: its own client gets the log-probabilities and texts that the library gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from landmark.evals.harness import as_sampling
from landmark.evals.likelihood import LanguageModel

from .conftest import Live, model_and_tokenizer

PAIRS = [("The with statement", " is used"), ("import", " os"), ("A function", " returns a value"), ("x", "é 猫")]


@pytest.fixture(scope="module")
def harness(tiny: Live, tmp_path_factory: pytest.TempPathFactory) -> LocalCompletionsAPI:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    model_and_tokenizer()[1].save(folder)
    return LocalCompletionsAPI(
        base_url=tiny.url + "/v1/completions", model="tiny", tokenizer=str(folder), tokenizer_backend="huggingface",
        batch_size=3, max_length=512, tokenized_requests=True,
    )  # fmt: skip


def instance(kind: str, *arguments: object) -> Instance:
    return Instance(kind, {}, arguments, 0)  # type: ignore[arg-type]


def test_likelihood(harness: LocalCompletionsAPI) -> None:
    ours = LanguageModel(*model_and_tokenizer()).loglikelihood(PAIRS)
    theirs = harness.loglikelihood([instance("loglikelihood", *pair) for pair in PAIRS], disable_tqdm=True)
    for a, (logprob, greedy) in zip(ours, theirs, strict=True):
        assert abs(a.logprob - logprob) < 1e-3 and a.greedy == greedy


def test_rolling_likelihood(harness: LocalCompletionsAPI) -> None:
    texts = ["The with statement is used to wrap the execution of a block.", "import os"]
    ours = LanguageModel(*model_and_tokenizer()).loglikelihood_rolling(texts)
    theirs = harness.loglikelihood_rolling(
        [instance("loglikelihood_rolling", text) for text in texts], disable_tqdm=True
    )
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a - b) < 1e-3


def test_generate_until(harness: LocalCompletionsAPI) -> None:
    options = {"until": ["e"], "max_gen_toks": 12, "temperature": 0.0}
    prompts = ["The with statement", "import os"]
    ours = LanguageModel(*model_and_tokenizer()).generate_until([(p, as_sampling(dict(options))) for p in prompts])
    theirs = harness.generate_until([instance("generate_until", p, dict(options)) for p in prompts], disable_tqdm=True)
    assert ours == theirs

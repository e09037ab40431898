from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import landmark
from landmark.infer import generate as module
from landmark.infer.defaults import recommended, stop_ids
from landmark.infer.generate import Answer, generate, groups, stream
from landmark.infer.sampling import Sampling
from landmark.infer.text import TextStream, overlap

from ..models.families import perturb
from .models import LLAMA, build, every_family, llama, marian, speaker, tokenizer

PROMPTS = [[5, 6, 7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [3], [8, 9, 10]]
GREEDY = Sampling(temperature=0, max_tokens=12, stop_ids=())
FAMILIES = every_family()


def say(text: str, **settings: Any) -> Answer:
    """The speaker's answer, driven to say `text` by making each of its tokens certain in turn."""
    tok = tokenizer()
    ids = tok.encode(text)
    model = build(LLAMA | {"vocab_size": tok.vocab_size})
    turns = iter(ids)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(hidden.shape[0], tok.vocab_size)
        out[:, next(turns, ids[-1])] = 100.0
        return out

    model.logits = logits
    sampling = Sampling(temperature=0, **{"max_tokens": len(ids), "stop_ids": (), **settings})
    return generate(model, [[1]], sampling, tokenizer=tok)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_p=0.9, seed=3, max_tokens=12, stop_ids=())])
def test_batch_equals_alone_and_full_forward(family: str, sampling: Sampling) -> None:
    """Prompts of different lengths together, each alone, and greedily by the whole text at each step."""
    model = build(FAMILIES[family])
    together = generate(model, PROMPTS, sampling, logprobs="model")
    for prompt, answer in zip(PROMPTS, together, strict=True):
        alone = generate(model, [prompt], sampling, logprobs="model")[0]
        assert answer.tokens == alone.tokens
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        if sampling.greedy:
            assert answer.tokens == by_whole_text(model, prompt, 12)


@torch.no_grad()
def by_whole_text(model: Any, prompt: list[int], n: int) -> list[int]:
    start = getattr(model.cfg, "start", None)
    said: list[int] = []
    for _ in range(n):
        if start is None:
            logits = model(torch.tensor([prompt + said]))
        else:
            logits = model(torch.tensor([prompt]), torch.tensor([[start, *said]]))
        said.append(int(logits[0, -1].argmax()))
    return said


def test_greedy_equals_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**LLAMA, pad_token_id=0, eos_token_id=50)).eval()
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    model: Any = landmark.load(tmp_path)
    assert stop_ids(model) == (50,)
    for settings in ({}, {"repetition_penalty": 1.4}):
        ours = generate(model, PROMPTS, Sampling(temperature=0, max_tokens=30, **settings))
        for prompt, answer in zip(PROMPTS, ours, strict=True):
            config = GenerationConfig(do_sample=False, max_new_tokens=30, eos_token_id=50, pad_token_id=0, **settings)
            out = theirs.generate(torch.tensor([prompt]), config)
            assert answer.tokens == out[0, len(prompt) :].tolist()


def test_settings_of_each_request() -> None:
    """One batch, different settings and lengths; who is finished leaves and changes nothing for the others."""
    samplings = [
        Sampling(temperature=0, max_tokens=3, stop_ids=()), Sampling(seed=1, max_tokens=9, stop_ids=()),
        Sampling(seed=2, top_k=5, frequency_penalty=0.8, max_tokens=12, stop_ids=()),
        Sampling(seed=1, repetition_penalty=1.5, max_tokens=6, stop_ids=()),
    ]  # fmt: skip
    together = generate(llama(), PROMPTS, samplings)
    assert [len(answer.tokens) for answer in together] == [3, 9, 12, 6]
    for prompt, sampling, answer in zip(PROMPTS, samplings, together, strict=True):
        assert generate(llama(), [prompt], sampling)[0].tokens == answer.tokens
    with pytest.raises(ValueError, match="2 samplings do not fit 4 prompts"):
        generate(llama(), PROMPTS, samplings[:2])


def test_seeds_repeat() -> None:
    sampling = Sampling(seed=9, max_tokens=20, stop_ids=())
    first, second = (generate(llama(), PROMPTS, sampling) for _ in range(2))
    assert first == second
    other = generate(llama(), PROMPTS, Sampling(seed=10, max_tokens=20, stop_ids=()))
    assert [a.tokens for a in first] != [a.tokens for a in other]


def test_stop_ids_end_the_answer() -> None:
    free = generate(llama(), PROMPTS, GREEDY)
    stop = free[1].tokens[4]
    answers = generate(llama(), PROMPTS, Sampling(temperature=0, max_tokens=12, stop_ids=(stop,)))
    for answer, whole in zip(answers, free, strict=True):
        cut = whole.tokens.index(stop) + 1 if stop in whole.tokens else 12
        assert answer.tokens == whole.tokens[:cut]
        assert answer.finish == ("stop" if stop in whole.tokens else "length")


def test_events_come_as_tokens_do() -> None:
    events = list(stream(llama(), PROMPTS, GREEDY, logprobs="sampled"))
    answers = generate(llama(), PROMPTS, GREEDY)
    assert [e.index for e in events[:8]] == [0, 1, 2, 3, 0, 1, 2, 3]
    for n, answer in enumerate(answers):
        mine = [e for e in events if e.index == n]
        assert [e.token for e in mine] == answer.tokens
        assert [e.finish for e in mine] == [None] * 11 + ["length"]
        assert {e.logprob for e in mine} == {0.0}


def test_streamed_text_is_the_text() -> None:
    tok, model = tokenizer(), speaker()
    prompts = [tok.encode("The with statement"), tok.encode("Naïve café 🙂")]
    sampling = Sampling(temperature=1.5, seed=4, max_tokens=40, stop_ids=())
    answers = generate(model, prompts, sampling, tokenizer=tok)
    pieces = ["", ""]
    for event in stream(model, prompts, sampling, tokenizer=tok):
        pieces[event.index] += event.text
    for answer, piece, prompt in zip(answers, pieces, prompts, strict=True):
        assert piece == answer.text
        assert tok.decode(prompt + answer.tokens) == tok.decode(prompt) + piece


@pytest.mark.parametrize("stop", ["brown fox", "ox j", "!", "The"])
def test_stop_strings_that_span_tokens(stop: str) -> None:
    text = "The quick brown fox jumps! The end"
    answer = say(text, stop=("never said", stop))
    assert answer.text == text[: text.index(stop)]
    assert answer.finish == "stop"
    assert text.startswith(tokenizer().decode(answer.tokens))


def test_text_that_only_begins_a_stop_string_is_kept() -> None:
    text = "ab brown fo"
    answer = say(text, stop=("brown fox",))
    assert (answer.text, answer.finish) == (text, "length")


def test_the_earliest_stop_string_wins_whatever_their_order() -> None:
    for stop in (("fox", "quick brown"), ("quick brown", "fox")):
        assert say("The quick brown fox", stop=stop).text == "The "


def test_held_back_text() -> None:
    """No piece ever shows a part of a stop string."""
    tok = tokenizer()
    stop = "### Answer:"
    for text, want in (("x ## y ### Ans", "x ## y ### Ans"), ("x ### Answer: 5", "x "), ("##### Answer:", "##")):
        held = TextStream(tok, (), (stop,))
        pieces = [held.feed(token) for token in tok.encode(text)]
        assert "".join(pieces) + held.finish() == want
        assert all(overlap("".join(pieces[: n + 1]), stop) == 0 or held.stopped for n in range(len(pieces)))
    assert [overlap("abc#", "##x"), overlap("##", "##"), overlap("", "a"), overlap("aba", "abac")] == [1, 1, 0, 3]


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="the stop string 'x' needs a tokenizer"):
        generate(llama(), PROMPTS, Sampling(stop=("x",)))


def test_the_end_of_the_context() -> None:
    """Every position of the context is used, and nothing beyond it."""
    whole = [n % 90 for n in range(64)]
    for length, room in ((60, 5), (64, 1), (10, 55)):
        answer = generate(llama(), [whole[:length]], Sampling(temperature=0, max_tokens=500, stop_ids=()))[0]
        assert (len(answer.tokens), answer.finish) == (room, "length")
    with pytest.raises(ValueError, match="prompt 1 has 65 tokens, longer than the model's context of 64"):
        generate(llama(), [[1], [*whole, 0]], GREEDY)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "prompt 1 is empty"), ([[97]], "holds the id 97, but the model's vocabulary ends at 96")],
)
def test_bad_prompts(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(llama(), prompts, GREEDY)


def test_a_model_in_training_mode() -> None:
    with pytest.raises(ValueError, match=r"training mode; call model.eval\(\)"):
        generate(landmark.build(LLAMA), PROMPTS, GREEDY)  # type: ignore[arg-type]


def test_no_prompts() -> None:
    assert generate(llama(), [], GREEDY) == []


def test_many_prompts_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(groups([5, 5, 90_000, 5])) == [[0, 1], [2], [3]]
    want = generate(llama(), PROMPTS, GREEDY)
    monkeypatch.setattr(module, "AT_ONCE", 3)
    assert list(groups([5] * 7)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert generate(llama(), PROMPTS, GREEDY) == want


def test_encoder_decoder_reads_sources() -> None:
    """A source's penalties count its answer, not the source; it may be as long as the encoder's context."""
    answer = generate(marian(), [[7] * 64], GREEDY)[0]
    assert len(answer.tokens) == 12
    with pytest.raises(ValueError, match="65 tokens, longer than the model's context of 64"):
        generate(marian(), [[7] * 65], GREEDY)


def test_what_a_models_files_ask_for(tmp_path: Path) -> None:
    landmark.save(llama(), tmp_path)
    asked = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "eos_token_id": [3, 4],
        "bad_words_ids": [[9], [1, 2]],
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(asked))
    model = landmark.load(tmp_path)
    got = recommended(model, top_p=0.5, seed=None)
    assert (got.temperature, got.top_p, got.logit_bias) == (0.6, 0.5, {9: -float("inf")})
    assert stop_ids(model) == (3, 4)
    assert recommended(llama()).temperature == 1.0
    assert stop_ids(llama(), tokenizer()) == (tokenizer().eos_id,)
    assert 3 in stop_ids(model, tokenizer())

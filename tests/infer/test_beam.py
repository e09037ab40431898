from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MarianConfig, MarianMTModel

import landmark
from landmark.infer.beam import Beams, beam_search, gnmt, power
from landmark.infer.generate import generate
from landmark.infer.sampling import Sampling

from ..models.families import perturb
from .models import LLAMA, MARIAN, build, llama, marian, speaker, tokenizer

EOS: dict[str, Any] = {"decoder": [50, 20, 33, 71], "encoder-decoder": 0}
PROMPTS = [[5, 6, 7], [11, 12, 13, 14, 15, 16, 17], [3]]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.3])
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_equal_to_transformers(kind: str, alpha: float, early: bool, tmp_path: Path) -> None:
    """Its length penalty is length^alpha, and its early_stopping="never" is our False."""
    torch.manual_seed(1)
    theirs: Any
    if kind == "decoder":
        theirs = LlamaForCausalLM(LlamaConfig(**LLAMA, pad_token_id=0, eos_token_id=EOS["decoder"])).eval()
    else:
        theirs = MarianMTModel(MarianConfig(**MARIAN | {"forced_eos_token_id": None})).eval()
        theirs.final_logits_bias[0, 0] = 2.0
    if kind == "decoder":
        perturb(theirs)
    theirs.save_pretrained(tmp_path)
    model: Any = landmark.load(tmp_path)
    beams = Beams(width=5, n_best=5, length_penalty=alpha, penalty="power", early_stopping=early, max_tokens=14)
    ended = 0
    for prompt, found in zip(PROMPTS, beam_search(model, PROMPTS, beams), strict=True):
        config = GenerationConfig(
            num_beams=5, num_return_sequences=5, length_penalty=alpha, early_stopping=early or "never",
            max_new_tokens=14, eos_token_id=EOS[kind], pad_token_id=60, decoder_start_token_id=60, do_sample=False,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        out = theirs.generate(torch.tensor([prompt]), config)
        skip = len(prompt) if kind == "decoder" else 1
        for hypothesis, row, score in zip(found, out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
            assert hypothesis.tokens == row[skip : skip + len(hypothesis.tokens)]
            assert set(row[skip + len(hypothesis.tokens) :]) <= {60}
            assert hypothesis.score == pytest.approx(score, abs=1e-4)
            ended += hypothesis.finish == "stop"
    assert ended > 2 or alpha > 1  # a strong reward of length leaves none that ends early


@torch.no_grad()
def exhaustive(model: Any, prompt: list[int], beams: Beams, stop: int, room: int) -> list[tuple[float, list[int]]]:
    """Every answer over the vocabulary, with its score, best first."""
    vocab, start = model.logits(torch.zeros(1, 1, 8)).shape[-1], getattr(model.cfg, "start", None)
    answers = [
        [*body, stop]
        for n in range(room)
        for body in itertools.product([t for t in range(vocab) if t != stop], repeat=n)
    ]
    answers += [list(body) for body in itertools.product([t for t in range(vocab) if t != stop], repeat=room)]
    scored = []
    for answer in answers:
        read = prompt if start is None else [start]
        target = torch.tensor([read + answer])
        logits = model(target[:, :-1]) if start is None else model(torch.tensor([prompt]), target[:, :-1])
        logprobs = logits[0].log_softmax(-1)[-len(answer) :]
        total = float(logprobs.gather(1, torch.tensor(answer)[:, None]).sum())
        scored.append((beams.score(total, len(answer)), answer))
    return sorted(scored, key=lambda x: -x[0])


SMALL: dict[str, dict[str, Any]] = {
    "decoder": LLAMA | {"vocab_size": 5, "hidden_size": 8, "num_attention_heads": 2},
    "encoder-decoder": MARIAN
    | {"vocab_size": 5, "d_model": 8, "pad_token_id": 3, "decoder_start_token_id": 3},
}  # fmt: skip


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_equal_to_exhaustive_search(kind: str, alpha: float) -> None:
    """A beam as wide as the number of prefixes misses nothing: 5 tokens, answers of up to 4."""
    model = build(SMALL[kind], seed=2)
    beams = Beams(width=4**4, n_best=20, length_penalty=alpha, max_tokens=4, stop_ids=(2,))
    for prompt, found in zip(
        [[0, 1], [4, 4, 1, 0, 1]], beam_search(model, [[0, 1], [4, 4, 1, 0, 1]], beams), strict=True
    ):
        want = exhaustive(model, prompt, beams, stop=2, room=4)[:20]
        assert [h.score for h in found] == pytest.approx([score for score, _ in want], abs=1e-5)
        assert found[0].tokens == want[0][1]
    assert beam_search(model, [[0, 1]], beams)[0][0].score >= beam_search(
        model, [[0, 1]], Beams(width=1, length_penalty=alpha, max_tokens=4, stop_ids=(2,))
    )[0][0].score - 1e-6  # fmt: skip


def test_the_two_penalties() -> None:
    assert gnmt(0.6, 1) == 1.0
    assert gnmt(0.6, 7) == pytest.approx((12 / 6) ** 0.6)
    assert power(1.0, 7) == 7.0
    assert Beams(length_penalty=0.0).score(-3.0, 9) == Beams(length_penalty=0.0, penalty="power").score(-3.0, 9) == -3.0


@pytest.mark.parametrize("make", [llama, marian])
def test_width_one_is_greedy(make: Any) -> None:
    greedy = generate(make(), PROMPTS, Sampling(temperature=0, max_tokens=10))
    beams = beam_search(make(), PROMPTS, Beams(width=1, max_tokens=10, early_stopping=True))
    assert [found[0].tokens for found in beams] == [answer.tokens for answer in greedy]


@pytest.mark.parametrize("make", [llama, marian])
def test_together_equals_alone(make: Any) -> None:
    """Searches of one batch end at different times."""
    beams = Beams(width=3, n_best=3, max_tokens=12, stop_ids=tuple(range(0, 60, 4)))
    together = beam_search(make(), PROMPTS, beams)
    assert len({len(h.tokens) for found in together for h in found}) > 1
    for prompt, found in zip(PROMPTS, together, strict=True):
        alone = beam_search(make(), [prompt], beams)[0]
        assert [h.tokens for h in alone] == [h.tokens for h in found]
        assert [h.score for h in alone] == pytest.approx([h.score for h in found], abs=1e-4)
        assert all(h.score == pytest.approx(beams.score(h.logprob, len(h.tokens))) for h in found)


def test_text_and_context() -> None:
    tok = tokenizer()
    prompt = tok.encode("The with statement")
    best = beam_search(speaker(), [prompt], Beams(max_tokens=500, stop_ids=()), tokenizer=tok)[0][0]
    assert len(best.tokens) == 64 - len(prompt) + 1
    assert best.text == tok.decode(best.tokens)
    with pytest.raises(ValueError, match="longer than the model's context"):
        beam_search(llama(), [[1] * 65])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 0}, "width is 0; it must be at least 1"),
        ({"width": 2, "n_best": 3}, "n_best is 3, more than the width of 2"),
        ({"penalty": "none"}, "penalty is 'none'; choose one of gnmt, power"),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Beams(**values)

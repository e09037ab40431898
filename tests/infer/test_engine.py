"""The engine: every request's tokens are those that it gets alone, whatever happens around it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import landmark
from landmark.config import ModuleConfig
from landmark.infer.engine import Engine, Request, Sampling
from landmark.infer.generate import generate
from landmark.infer.session import turning_lengths
from landmark.models.decoder import Decoder

from ..models.families import perturb
from .mixers import MIXERS
from .models import LLAMA, TINY, build, every_family, speaker, tokenizer

CONTEXT = 256
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"head_dim": 16, "max_position_embeddings": CONTEXT},
    "narrow heads": LLAMA | {"max_position_embeddings": CONTEXT},
    "window": LLAMA
    | {
        "architectures": ["MistralForCausalLM"],
        "head_dim": 16,
        "sliding_window": 24,
        "max_position_embeddings": CONTEXT,
    },
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2}
    | {"n_positions": CONTEXT},
    "gemma": {"architectures": ["Gemma2ForCausalLM"], **json.loads((TINY / "gemma2.json").read_text())}
    | {"sliding_window": 16, "max_position_embeddings": CONTEXT},
}
TURNS = 48  # the length from which on rotations depend on it
LENGTHS: dict[str, dict[str, Any]] = {
    "dynamic ntk": MODELS["llama"]
    | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": TURNS}},
    "longrope": MODELS["llama"]
    | {"architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": TURNS, "pad_token_id": 0}
    | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0 + n for n in range(8)]}},
}
_built: dict[str, Decoder] = {}


def model(name: str) -> Decoder:
    if name not in _built:
        _built[name] = with_mixers(MIXERS[name]) if name in MIXERS else build((MODELS | LENGTHS)[name])
    return _built[name]


def with_mixers(mixers: tuple[ModuleConfig, ...]) -> Decoder:
    """The narrow llama with these in the place of attention, in turn."""
    cfg = landmark.build(MODELS["llama"]).cfg
    turn = itertools.cycle(mixers)
    layers = [{**layer, "attn": replace(layer["attn"], fn=next(turn))} for layer in cfg.layers]
    torch.manual_seed(0)
    made: Decoder = replace(cfg, layers=tuple(layers)).build().eval()
    perturb(made)
    return made


def requests(vocab: int, count: int = 12, shared: int = 40, longest: int = 60) -> list[Request]:
    """Of all lengths and samplings; every third begins like the others of its kind."""
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(0, vocab, (n,), generator=generator).tolist()

    beginning, kinds = ids(shared), [
        Sampling(temperature=0),
        Sampling(temperature=0.8, top_p=0.9, top_k=20),
        Sampling(min_p=0.02, repetition_penalty=1.2, frequency_penalty=0.1),
        Sampling(presence_penalty=0.5, logit_bias={3: 2.0, 5: -100.0}),
    ]  # fmt: skip
    found = []
    for n in range(count):
        prompt = (beginning if n % 3 == 0 else []) + ids(1 + 7 * n % longest)
        sampling = replace(kinds[n % 4], seed=n, max_tokens=5 + 5 * n % 31, stop_ids=())
        found.append(Request(prompt=prompt, sampling=sampling))
    return found


def alone(of: Decoder, request: Request) -> list[int]:
    return generate(of, [request.prompt], request.sampling)[0].tokens


def tight(of: Decoder, tokens: int, **options: Any) -> Engine:
    """An engine with the least memory for one sequence of so many tokens."""
    low, high = 0, 1 << 24
    while high - low > 256:
        middle = (low + high) // 2
        try:
            fits = Engine(of, memory=middle, **options).longest >= tokens
        except ValueError:
            fits = False
        low, high = (low, middle) if fits else (middle, high)
    return Engine(of, memory=high, **options)


def empty(engine: Engine) -> bool:
    """Nothing is held by sequences any more."""
    return engine.stats().used == 0 and engine.stats().running == 0 and not engine._handles


@pytest.mark.parametrize("name", [*MODELS, *MIXERS])
def test_tokens_are_those_of_running_alone(name: str) -> None:
    asked = requests(model(name).cfg.embed.vocab)
    engine = Engine(model(name), memory=1 << 24, max_batch=5, chunk=24, block=8)
    assert [a[0].tokens for a in engine.generate(asked)] == [alone(model(name), r) for r in asked]
    assert engine.stats().cached_tokens > 0 and empty(engine)


@pytest.mark.parametrize("architecture", every_family())
def test_every_family(architecture: str) -> None:
    of = build(every_family()[architecture])
    if not isinstance(of, Decoder):
        with pytest.raises(ValueError, match="serves decoders"):
            Engine(of, memory=1 << 24)
        return
    asked = requests(of.cfg.embed.vocab, count=8, shared=17, longest=15)
    engine = Engine(of, memory=1 << 24, max_batch=3, chunk=12, block=4)
    assert [a[0].tokens for a in engine.generate(asked)] == [alone(of, r) for r in asked]
    assert (engine.stats().cached_tokens > 0 or turning_lengths(of)) and empty(engine)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "narrow heads"])
def test_who_gave_way_goes_on_with_the_same_tokens(name: str) -> None:
    asked = requests(model(name).cfg.embed.vocab)
    engine = tight(model(name), 152, max_batch=8, chunk=24, block=8)
    assert [a[0].tokens for a in engine.generate(asked)] == [alone(model(name), r) for r in asked]
    assert engine.stats().preempted > 0 and empty(engine)


@pytest.mark.parametrize("tokens", [None, CONTEXT])
@pytest.mark.parametrize("name", LENGTHS)
def test_rotations_that_depend_on_the_length(name: str, tokens: int | None) -> None:
    """Short texts and long ones, and such as grow long; with room for all, or with many that give way."""
    of, draw = model(name), requests(97, count=24, shared=40, longest=60)
    long = [replace(request, prompt=[n] * 7 + [*request.prompt] * 2) for n, request in enumerate(draw[::3])]
    asked = [request for pair in zip(draw, [*long, *draw[1::3], *draw[2::3]], strict=True) for request in pair]
    options = {"max_batch": 8, "chunk": 24, "block": 8}
    engine = Engine(of, memory=1 << 24, **options) if tokens is None else tight(of, tokens, **options)
    found = [a[0].tokens for a in engine.generate(asked)]
    assert found == [alone(of, request) for request in asked]
    lengths = [
        (len(request.prompt), len(request.prompt) + len(said)) for request, said in zip(asked, found, strict=True)
    ]
    assert any(a < TURNS < b for a, b in lengths) and any(a > 2 * TURNS for a, _ in lengths)
    stats = engine.stats()
    assert stats.cached_tokens > 0 and (stats.preempted > 0) == (tokens is not None) and empty(engine)


@pytest.mark.parametrize("name", ["llama", "gemma", "recurrence and attention"])
def test_others_leave(name: str) -> None:
    asked = requests(model(name).cfg.embed.vocab)
    engine = Engine(model(name), memory=1 << 24, max_batch=5, chunk=24, block=8)
    handles = [engine.submit(request) for request in asked]
    for n, handle in enumerate(handles):
        if n % 2:
            engine.step()
            handle.cancel()
    for request, handle in list(zip(asked, handles, strict=True))[::2]:
        assert handle.result()[0].tokens == alone(model(name), request)
    assert all(handle.cancelled and list(handle) is not None for handle in handles[1::2])
    assert empty(engine)


@pytest.mark.parametrize("name", [*MODELS, *MIXERS])
def test_what_was_read_is_found_again(name: str) -> None:
    """A conversation: each prompt is the last one, its answer and something new."""
    of = model(name)
    engine = Engine(of, memory=1 << 24, max_batch=2, chunk=48, block=8, interval=16)
    prompt = requests(of.cfg.embed.vocab)[0].prompt
    for turn in range(3):
        request = Request(prompt=prompt, sampling=Sampling(temperature=0, max_tokens=30, stop_ids=()))
        handle = engine.submit(request)
        tokens = handle.result()[0].tokens
        assert tokens == alone(of, request)
        assert (handle.cached > len(prompt) - 40) == (turn > 0)
        prompt = [*prompt, *tokens, 1, 2, 3]
    assert empty(engine)


def test_a_state_is_kept_where_texts_part() -> None:
    """Two prompts show that a beginning is shared; the third starts after it."""
    of = model("recurrence")
    engine = Engine(of, memory=1 << 24, max_batch=2, chunk=64, block=8, interval=1024)
    beginning, greedy = list(range(50)), Sampling(temperature=0, max_tokens=5, stop_ids=())
    cached = []
    for n in range(3):
        request = Request(prompt=[*beginning, *[60 + n] * 30], sampling=greedy)
        handle = engine.submit(request)
        assert handle.result()[0].tokens == alone(of, request)
        cached.append(handle.cached)
    assert cached == [0, 0, 48]


@pytest.mark.parametrize("name", ["llama", "window", "recurrence"])
def test_what_is_remembered_gives_way(name: str) -> None:
    """Far more texts than fit, some of them again and again."""
    of = model(name)
    options = {"max_batch": 2, "chunk": 32, "block": 4, "interval": 16}
    engine = Engine(of, memory=2400, **options) if name == "recurrence" else tight(of, 200, **options)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, of.cfg.embed.vocab, (50,), generator=generator).tolist() for _ in range(12)]
    for n in torch.randint(0, 12, (40,), generator=generator).tolist():
        request = Request(prompt=texts[n][: 20 + n], sampling=Sampling(temperature=0, max_tokens=4, stop_ids=()))
        assert engine.generate([request])[0][0].tokens == alone(of, request)
    assert empty(engine) and 0 < engine.stats().cached_tokens


def test_several_answers() -> None:
    of, sampling = model("llama"), Sampling(seed=7, max_tokens=12, stop_ids=())
    prompt = list(range(30))
    engine = Engine(of, memory=1 << 24, max_batch=8, block=8)
    seeded = [alone(of, Request(prompt=prompt, sampling=replace(sampling, seed=7 + n))) for n in range(5)]
    handle = engine.submit(Request(prompt=prompt, sampling=sampling, n=5))
    assert [answer.tokens for answer in handle.result()] == seeded
    assert engine.stats().cached_tokens == 4 * 24  # the others found the prompt read
    best = engine.submit(Request(prompt=prompt, sampling=sampling, n=2, best_of=5, logprobs="model")).result()
    every = generate(of, [prompt] * 5, [replace(sampling, seed=7 + n) for n in range(5)], logprobs="model")
    every.sort(key=lambda answer: -sum(answer.logprobs) / len(answer.logprobs))
    assert [answer.tokens for answer in best] == [answer.tokens for answer in every[:2]]
    assert best[0].logprobs == pytest.approx(every[0].logprobs, abs=1e-5)


@pytest.mark.parametrize("which", ["model", "sampled"])
def test_log_probabilities(which: Any) -> None:
    of, prompt = model("llama"), list(range(40, 90))
    sampling = Sampling(temperature=0.7, top_k=10, seed=3, max_tokens=9, stop_ids=())
    engine = Engine(of, memory=1 << 24, chunk=16, block=8)
    handle = engine.submit(Request(prompt=prompt, sampling=sampling, logprobs=which, top=3, prompt_logprobs=2))
    events = list(handle)
    expected = generate(of, [prompt], sampling, logprobs=which)[0]
    assert [event.token for event in events] == expected.tokens
    assert [event.logprob for event in events] == pytest.approx(expected.logprobs, abs=1e-5)
    with torch.no_grad():
        table = of(torch.tensor([[*prompt, *expected.tokens]]))[0].log_softmax(1)
    for n, event in enumerate(events):
        assert len(event.top) == 3 and list(event.top) == sorted(event.top, key=lambda scored: -scored[1])
        if which == "model":
            assert dict(event.top) == pytest.approx(dict(_likeliest(table[len(prompt) - 1 + n], 3)), abs=1e-5)
    assert len(handle.prompt_logprobs) == len(prompt) - 1
    for n, ((token, logprob), top) in enumerate(handle.prompt_logprobs):
        assert token == prompt[n + 1] and logprob == pytest.approx(table[n, token].item(), abs=1e-5)
        assert dict(top) == pytest.approx(dict(_likeliest(table[n], 2)), abs=1e-5)


def _likeliest(row: torch.Tensor, count: int) -> list[tuple[int, float]]:
    values, ids = row.topk(count)
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def test_text_and_stop_strings() -> None:
    of, words = speaker(), tokenizer()
    engine = Engine(of, words, memory=1 << 24, block=8, max_batch=3)
    prompts = [words.encode(text) for text in ("The value of", "An import statement", "Python is")]
    settings = [Sampling(seed=n, max_tokens=20, stop=("e", "\n")) for n in range(3)]
    answers = engine.generate([Request(prompt=p, sampling=s) for p, s in zip(prompts, settings, strict=True)])
    for prompt, sampling, (answer,) in zip(prompts, settings, answers, strict=True):
        expected = generate(of, [prompt], sampling, tokenizer=words)[0]
        assert (answer.tokens, answer.text, answer.finish) == (expected.tokens, expected.text, expected.finish)


def test_the_end_of_the_context() -> None:
    of = model("llama")
    engine = Engine(of, memory=1 << 24)
    answer = engine.generate([Request(prompt=[1] * 250, sampling=Sampling(temperature=0, stop_ids=()))])[0][0]
    assert (len(answer.tokens), answer.finish) == (7, "length")
    small = tight(of, 64, max_batch=1, chunk=16, block=8)
    answer = small.generate([Request(prompt=[1] * 60, sampling=Sampling(temperature=0, stop_ids=()))])[0][0]
    assert (len(answer.tokens), answer.finish) == (small.longest - 59, "length")


def test_rotations_that_turn() -> None:
    of: Decoder = build({"architectures": ["Phi3ForCausalLM"], **json.loads((TINY / "phi3.json").read_text())})
    turn = max(turning_lengths(of))
    asked = [
        Request(prompt=[3 + n] * length, sampling=Sampling(seed=n, max_tokens=12, stop_ids=()))
        for n, length in enumerate((turn - 8, turn - 1, turn, turn + 3, 5))
    ]
    engine = Engine(of, memory=1 << 24, max_batch=3, chunk=8, block=8)
    assert [a[0].tokens for a in engine.generate(asked)] == [alone(of, request) for request in asked]


class Odd:
    """A guide: odd tokens only, and five of them."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.mask = torch.arange(97) % 2 == 1

    def allowed(self) -> torch.Tensor:
        return self.mask

    def accept(self, token: int) -> None:
        self.taken.append(token)

    @property
    def finished(self) -> bool:
        return len(self.taken) == 5


def test_guided_and_free_answers_side_by_side() -> None:
    of, sampling = model("llama"), Sampling(temperature=3.0, seed=1, max_tokens=20, stop_ids=())
    engine = Engine(of, memory=1 << 24)
    guided, free = Request(prompt=[1, 2], sampling=sampling, guide=Odd), Request(prompt=[1, 2], sampling=sampling)
    (odd,), (other,) = engine.generate([guided, free])
    assert all(token % 2 for token in odd.tokens) and (len(odd.tokens), odd.finish) == (5, "stop")
    assert other.tokens == alone(of, free)

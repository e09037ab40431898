"""The engine: every request's tokens are those that it gets alone, whatever happens around it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from landmark.infer.engine import Engine, Request, Sampling
from landmark.infer.generate import generate
from landmark.models.decoder import Decoder

from .models import LLAMA, TINY, build

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
_built: dict[str, Decoder] = {}


def model(name: str) -> Decoder:
    if name not in _built:
        _built[name] = build(MODELS[name])
    return _built[name]


def requests(vocab: int, count: int = 12, shared: int = 40) -> list[Request]:
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
        prompt = (beginning if n % 3 == 0 else []) + ids(1 + 7 * n % 60)
        sampling = replace(kinds[n % 4], seed=n, max_tokens=5 + 5 * n % 31, stop_ids=())
        found.append(Request(prompt=prompt, sampling=sampling))
    return found


def alone(of: Decoder, request: Request) -> list[int]:
    return generate(of, [request.prompt], request.sampling)[0].tokens


def memory(of: Decoder, tokens: int, block: int = 8) -> int:
    """Bytes that hold so many tokens of one sequence, give or take a block."""
    low, high = 0, 1 << 30
    while high - low > 64:
        middle = (low + high) // 2
        try:
            fits = Engine(of, memory=middle, max_batch=1, chunk=16, block=block).longest >= tokens
        except ValueError:
            fits = False
        low, high = (low, middle) if fits else (middle, high)
    return high


def empty(engine: Engine) -> bool:
    """Nothing is held by sequences any more."""
    return engine.stats().used == 0 and engine.stats().running == 0 and not engine._handles


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_running_alone(name: str) -> None:
    asked = requests(model(name).cfg.embed.vocab)
    engine = Engine(model(name), memory=1 << 24, max_batch=5, chunk=24, block=8)
    assert [a[0].tokens for a in engine.generate(asked)] == [alone(model(name), r) for r in asked]
    assert engine.stats().cached_tokens > 0 and empty(engine)


@pytest.mark.parametrize("name", ["llama", "gpt2", "narrow heads"])
def test_who_gave_way_goes_on_with_the_same_tokens(name: str) -> None:
    asked = requests(model(name).cfg.embed.vocab)
    engine = Engine(model(name), memory=memory(model(name), 152), max_batch=8, chunk=24, block=8)
    assert [a[0].tokens for a in engine.generate(asked)] == [alone(model(name), r) for r in asked]
    assert engine.stats().preempted > 0 and empty(engine)

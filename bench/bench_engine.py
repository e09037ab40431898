"""The engine: its own cost a step, many requests at once beside transformers, and the start after a shared beginning.

    python bench/bench_engine.py [--only overhead,concurrent,prefix] [--shape tiny|100m|llama-1.2b] [--rounds 3]
        [--requests 64] [--tokens 64] [--json]

overhead    processor time of a step that is not the model's, for a tiny model, on one thread; the aim is 1 ms + 10 us a
            running sequence
concurrent  so many requests of 16 to 128 prompt tokens and as many new ones each as told, greedy, all at once:
            transformers' generate_batch and ours, in turn
prefix      time to the first token of a prompt of 2048 + 16 tokens: new, and when its first 2048 were read before
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_generate import LLAMA, SHAPES
from pair import interleave, show

import landmark
from landmark.infer.engine import Engine, Request, Sampling
from landmark.models.decoder import Decoder

MINI = LLAMA | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
}  # fmt: skip
SIZES: dict[str, tuple[str, dict[str, Any]]] = SHAPES | {
    "100m": (
        "bfloat16",
        LLAMA | {
            "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
            "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
KINDS = {
    "greedy": Sampling(temperature=0),
    "temperature": Sampling(temperature=0.8),
    "top-k, top-p": Sampling(temperature=0.8, top_k=40, top_p=0.95),
}


def model_of(shape: str, longest: int = 4096) -> Decoder:
    dtype, hf = ("float32", MINI) if shape == "mini" else SIZES[shape]
    torch.manual_seed(0)
    model = landmark.build(hf | {"max_position_embeddings": longest}).to(getattr(torch, dtype)).eval()
    assert isinstance(model, Decoder)
    return model


def overhead(rounds: int) -> list[dict[str, Any]]:
    model, rows = model_of("mini"), []
    threads, inside = torch.get_num_threads(), 0.0
    torch.set_num_threads(1)

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal inside
            began = time.thread_time()
            out = function(*args, **options)
            inside += time.thread_time() - began
            return out

        return call

    model.hidden, model.logits = timed(model.hidden), timed(model.logits)  # type: ignore[method-assign]
    for name, kind in KINDS.items():
        for count in (1, 16, 64, 256):
            engine = Engine(model, memory=1 << 28, max_batch=count, chunk=8192)
            for n in range(count):
                sampling = Sampling(**{**vars(kind), "seed": n, "max_tokens": 4000, "stop_ids": ()})
                engine.submit(Request(prompt=[n % 500] * 16, sampling=sampling))
            for _ in range(10):
                engine.step()
            own = []
            for _ in range(50 * rounds):
                inside, began = 0.0, time.thread_time()
                engine.step()
                own.append((time.thread_time() - began - inside) * 1e3)
            aim = 1 + 0.01 * count
            ms = statistics.median(own)
            rows.append({"sampling": name, "sequences": count, "ms": ms, "aim_ms": aim, "share": ms / aim})
    torch.set_num_threads(threads)
    return rows


def concurrent(shape: str, rounds: int, requests: int, tokens: int) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype, _ = SIZES[shape]
    model = model_of(shape)
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 129, (requests,), generator=g).tolist()
    prompts = [torch.randint(0, model.cfg.embed.vocab, (n,), generator=g).tolist() for n in lengths]
    with tempfile.TemporaryDirectory() as directory:
        landmark.save(model, directory)
        peer = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def theirs() -> list[list[int]]:
        out = peer.generate_batch(prompts, generation_config=config, progress_bar=False)
        return [list(answer.generated_tokens) for answer in out.values()]

    greedy = Sampling(temperature=0, max_tokens=tokens, stop_ids=())

    def ours() -> list[list[int]]:
        engine = Engine(model, memory=1 << 30, max_batch=requests, prefixes=False)
        return [a[0].tokens for a in engine.generate([Request(prompt=p, sampling=greedy) for p in prompts])]

    assert {len(answer) for answer in theirs()} == {len(answer) for answer in ours()} == {tokens}
    times = interleave(ours, theirs, rounds)
    new = requests * tokens
    rates = {"ours_tokens_s": new / times["ours_s"], "theirs_tokens_s": new / times["theirs_s"]}
    return [{"shape": shape, "requests": requests, **rates, **times}]


def prefix(shape: str, rounds: int) -> list[dict[str, Any]]:
    model, g = model_of(shape), torch.Generator().manual_seed(0)
    first = Sampling(temperature=0, max_tokens=1, stop_ids=())

    def ids(n: int) -> list[int]:
        return torch.randint(0, model.cfg.embed.vocab, (n,), generator=g).tolist()

    def start(engine: Engine, prompt: list[int]) -> float:
        began = time.perf_counter()
        engine.generate([Request(prompt=prompt, sampling=first)])
        return time.perf_counter() - began

    engine = Engine(model, memory=1 << 30, max_batch=4)
    new, again = [], []
    for _ in range(rounds):
        shared = ids(2048)
        new.append(start(engine, [*shared, *ids(16)]))
        again.append(start(engine, [*shared, *ids(16)]))
    ratio = statistics.median(a / b for a, b in zip(new, again, strict=True))
    return [{"shape": shape, "new_s": statistics.median(new), "again_s": statistics.median(again), "speedup": ratio}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="overhead,concurrent,prefix")
    parser.add_argument("--shape", default="100m", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    wanted = args.only.split(",")
    if "overhead" in wanted:
        show(overhead(args.rounds), args.json)
    if "concurrent" in wanted:
        show(concurrent(args.shape, args.rounds, args.requests, args.tokens), args.json)
    if "prefix" in wanted:
        show(prefix(args.shape, args.rounds), args.json)


if __name__ == "__main__":
    main()

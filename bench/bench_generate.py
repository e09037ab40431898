"""Generation beside transformers: the same random weights, prompts and greedy answers, in one run, A B A B.

    python bench/bench_generate.py [--quick] [--rounds 5] [--shape NAME] [--batch 8] [--tokens 64] [--json]

Both read one directory of random weights. A row is one call: prompts of 32 tokens (`ragged`: of 8 to 64; transformers
pads them) and 64 new ones; its time has both in it. `tokens_s` is ours, new tokens over the whole call.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from pair import interleave, show

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 5e5}
GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "float32",
        LLAMA | {
            "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2-124m": ("float32", GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12}),
    "llama-1.2b": (
        "bfloat16",
        LLAMA | {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
BATCHES = {"1": [32], "8": [32] * 8, "8 ragged": [8, 16, 24, 32, 40, 48, 56, 64]}


def our_run(directory: str, prompts: list[list[int]], tokens: int) -> Callable[[], list[list[int]]]:
    import landmark
    from landmark.infer.generate import generate
    from landmark.infer.sampling import Sampling
    from landmark.models.decoder import Decoder

    model = landmark.load(directory)
    assert isinstance(model, Decoder)
    greedy = Sampling(temperature=0, max_tokens=tokens, stop_ids=())
    return lambda: [answer.tokens for answer in generate(model, prompts, greedy)]


def their_run(directory: str, dtype: str, prompts: list[list[int]], tokens: int) -> Callable[[], list[list[int]]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def run() -> list[list[int]]:
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0
        )
        return [row[width:] for row in out.tolist()]

    return run


def measure(shape: str, batches: list[str], rounds: int, tokens: int) -> list[dict[str, Any]]:
    import landmark

    dtype, hf = SHAPES[shape]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        landmark.save(landmark.build(hf).to(getattr(torch, dtype)), directory)
        for name in batches:
            lengths = BATCHES[name]
            generator = torch.Generator().manual_seed(1)
            prompts = [torch.randint(1, hf["vocab_size"], (n,), generator=generator).tolist() for n in lengths]
            ours, theirs = our_run(directory, prompts, tokens), their_run(directory, dtype, prompts, tokens)
            equal = sum(a == b for x, y in zip(ours(), theirs(), strict=True) for a, b in zip(x, y, strict=True))
            times = interleave(ours, theirs, rounds)
            rows.append(
                {"shape": shape, "dtype": dtype, "batch": name, **times}
                | {"tokens_s": len(prompts) * tokens / times["ours_s"], "equal": f"{equal}/{len(prompts) * tokens}"}
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), action="append", help="default: gpt2-124m and llama-1.2b")
    parser.add_argument("--batch", choices=list(BATCHES), action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="the tiny shape only, in seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from transformers.utils import logging

    logging.set_verbosity_error()
    shapes = ["tiny"] if options.quick else options.shape or ["gpt2-124m", "llama-1.2b"]
    batches = options.batch or list(BATCHES)
    show([row for shape in shapes for row in measure(shape, batches, options.rounds, options.tokens)], options.json)


if __name__ == "__main__":
    main()

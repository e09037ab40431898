"""RWKV beside peers: the same random weights, prompts and greedy answers, in one run, A B A B.

    python bench/bench_rwkv.py [--quick] [--rounds 5] [--only train|generate] [--json]

RWKV-4 beside transformers: training (forward, backward and AdamW on 4 x 512 tokens; transformers goes over time in
Python) and generation. RWKV-7 beside its authors' package, which only decodes: 64 tokens after prompts of 32.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_generate import our_run, their_run
from bench_train import BATCH, LENGTH, our_step, their_step, tokens_for
from pair import interleave, show

FOUR: dict[str, Any] = {"architectures": ["RwkvForCausalLM"], "model_type": "rwkv"}
SEVEN: dict[str, Any] = {"architectures": ["RWKV-x070"], "model_type": "rwkv7", "head_size": 64}
TINY: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024}
SMALL: dict[str, Any] = {"vocab_size": 50277, "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
SHAPES = {"tiny": TINY, "169m": SMALL}
PROMPT = list(range(7, 39))


def authors_run(directory: Path, hf: dict[str, Any], dtype: str, tokens: int) -> Callable[[], list[list[int]]]:
    """Greedy answers of the authors' package, from a file of the same weights."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    from rwkv.model import RWKV

    from landmark.weights.files import read_tensors

    torch.save(read_tensors(directory), directory / "model.pth")
    model = RWKV(str(directory / "model"), "cpu fp32" if dtype == "float32" else "cpu bf16")

    def run() -> list[list[int]]:
        scores, state = model.forward(PROMPT, None)
        answer = [int(scores.argmax())]
        while len(answer) < tokens:
            scores, state = model.forward(answer[-1:], state)
            answer.append(int(scores.argmax()))
        return [answer]

    return run


def time_training(names: list[str], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        hf = SHAPES[name] | FOUR
        for dtype in (torch.bfloat16, torch.float32):
            tokens = tokens_for(hf)
            times = interleave(our_step(hf, dtype, tokens), their_step(hf, dtype, tokens), rounds)
            rate = BATCH * LENGTH / times["ours_s"]
            rows.append({"train": f"rwkv-4 {name}", "dtype": str(dtype)[6:], "tokens/s": rate, **times})
    return rows


def time_generation(names: list[str], rounds: int, tokens: int = 64) -> list[dict[str, Any]]:
    import landmark

    rows = []
    for name in names:
        for kind, family in (("rwkv-4", FOUR), ("rwkv-7", SEVEN)):
            for dtype in ("bfloat16", "float32"):
                hf = SHAPES[name] | family
                with tempfile.TemporaryDirectory() as directory:
                    torch.manual_seed(0)
                    landmark.save(landmark.build(hf).to(getattr(torch, dtype)), directory)
                    ours = our_run(directory, [PROMPT], tokens)
                    if kind == "rwkv-4":
                        theirs = their_run(directory, dtype, [PROMPT], tokens)
                    else:
                        theirs = authors_run(Path(directory), hf, dtype, tokens)
                    equal = sum(a == b for a, b in zip(ours()[0], theirs()[0], strict=True))
                    times = interleave(ours, theirs, rounds)
                row = {"generate": f"{kind} {name}", "dtype": dtype, "tokens/s": tokens / times["ours_s"], **times}
                rows.append(row | {"equal": f"{equal}/{tokens}"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("train", "generate"))
    parser.add_argument("--quick", action="store_true", help="the tiny shape only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from transformers.utils import logging

    logging.set_verbosity_error()
    names = [name for name in SHAPES if not options.quick or name == "tiny"]
    if options.only != "generate":
        show(time_training(names, options.rounds), options.json)
    if options.only != "train":
        show(time_generation(names, options.rounds), options.json)


if __name__ == "__main__":
    main()

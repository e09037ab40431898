"""Mamba, Mamba-2 and Jamba beside transformers: training steps and greedy generation, the same random weights, A B A B.

    python bench/bench_mamba.py [--quick] [--rounds 3] [--only train|generate] [--model NAME] [--json]

Training is forward, backward and AdamW on one text of 512 tokens, because transformers keeps every state of Mamba's
scan for backward; generation, 64 tokens after prompts of 32 for one and for eight texts.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from bench_generate import BATCHES, our_run, their_run
from bench_train import our_step, their_step
from pair import interleave, show

MAMBA = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "state_size": 16}
MAMBA2 = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "state_size": 128, "n_groups": 1}
MAMBA2 |= {"head_dim": 64, "tie_word_embeddings": True}
JAMBA = {"architectures": ["JambaForCausalLM"], "model_type": "jamba", "max_position_embeddings": 2048}
JAMBA |= {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2, "num_attention_heads": 4}
TINY = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "mamba, tiny": MAMBA | TINY,
    "mamba, 129m": MAMBA | {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24},
    "mamba2, tiny": MAMBA2 | TINY | {"num_heads": 8},
    "mamba2, 129m": MAMBA2 | {"vocab_size": 50288, "hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24},
    "jamba, tiny": JAMBA | TINY | {"intermediate_size": 512, "attn_layer_period": 4, "attn_layer_offset": 2},
    "jamba, 112m": JAMBA | {
        "vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1024,
        "num_attention_heads": 8,
    },
}  # fmt: skip
LENGTH = 512


def time_training(names: list[str], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        for dtype in (torch.bfloat16, torch.float32):
            shape = SHAPES[name]
            tokens = torch.randint(0, shape["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(0))
            times = interleave(our_step(shape, dtype, tokens), their_step(shape, dtype, tokens), rounds)
            rows.append({"train": name, "dtype": str(dtype)[6:], "tokens/s": LENGTH / times["ours_s"], **times})
    return rows


def time_generation(names: list[str], rounds: int, tokens: int = 64) -> list[dict[str, Any]]:
    import landmark

    rows = []
    for name in names:
        for dtype in ("bfloat16", "float32"):
            with tempfile.TemporaryDirectory() as directory:
                torch.manual_seed(0)
                landmark.save(landmark.build(SHAPES[name]).to(getattr(torch, dtype)), directory)
                for batch in ("1", "8"):
                    prompts = [list(range(7 + i, 7 + i + n)) for i, n in enumerate(BATCHES[batch])]
                    ours, theirs = our_run(directory, prompts, tokens), their_run(directory, dtype, prompts, tokens)
                    times = interleave(ours, theirs, rounds)
                    rate = len(prompts) * tokens / times["ours_s"]
                    rows.append({"generate": name, "dtype": dtype, "texts": batch, "tokens/s": rate, **times})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("train", "generate"))
    parser.add_argument("--model", choices=("mamba", "mamba2", "jamba"))
    parser.add_argument("--quick", action="store_true", help="the tiny shapes only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from transformers.utils import logging

    logging.set_verbosity_error()
    names = [name for name in SHAPES if not options.quick or "tiny" in name]
    names = [name for name in names if options.model in (None, name.partition(",")[0])]
    if options.only != "generate":
        show(time_training(names, options.rounds), options.json)
    if options.only != "train":
        show(time_generation(names, options.rounds), options.json)


if __name__ == "__main__":
    main()

"""Mixtral beside transformers: training steps and greedy generation, the same random weights, in one run, A B A B.

    python bench/bench_moe.py [--quick] [--rounds 5] [--only train|generate] [--json]

`few` has Mixtral's eight experts of two, `many` Qwen3-MoE's fine experts: 64 of which a token passes eight. Training is
forward, backward and AdamW on 4 x 512 tokens; generation, 64 tokens after prompts of 32 for one and for eight texts.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from bench_generate import BATCHES, our_run, their_run
from bench_train import BATCH, LENGTH, our_step, their_step, tokens_for
from pair import interleave, show

COMMON = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "router_aux_loss_coef": 0.02}
FEW = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
MANY = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 64, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "head_dim": 64,
}  # fmt: skip
TINY = COMMON | {
    "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SMALL = COMMON | {
    "vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "few, tiny": TINY | FEW | {"intermediate_size": 512},
    "few, 113m": SMALL | FEW | {"intermediate_size": 1024},
    "many, 113m": SMALL | MANY | {"intermediate_size": 1024, "moe_intermediate_size": 128},
}


def time_training(names: list[str], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        for dtype in (torch.bfloat16, torch.float32):
            tokens = tokens_for(SHAPES[name])
            times = interleave(our_step(SHAPES[name], dtype, tokens), their_step(SHAPES[name], dtype, tokens), rounds)
            rate = BATCH * LENGTH / times["ours_s"]
            rows.append({"train": name, "dtype": str(dtype)[6:], "tokens/s": rate, **times})
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("train", "generate"))
    parser.add_argument("--quick", action="store_true", help="the tiny shape only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from transformers.utils import logging

    logging.set_verbosity_error()
    names = [name for name in SHAPES if not options.quick or "tiny" in name]
    if options.only != "generate":
        show(time_training(names, options.rounds), options.json)
    if options.only != "train":
        show(time_generation(names, options.rounds), options.json)


if __name__ == "__main__":
    main()

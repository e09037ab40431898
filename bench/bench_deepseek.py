"""DeepSeek-V3 beside transformers: training steps and greedy generation, the same random weights, in one run, A B A B.

    python bench/bench_deepseek.py [--quick] [--rounds 5] [--only train|generate] [--json]

Training is forward, backward and AdamW on 4 x 512 tokens; generation, 64 tokens after prompts of 32 for one and for
eight texts, and after one of 1,024, where transformers keeps keys and values of every head and we one latent vector.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from bench_generate import our_run, their_run
from bench_train import BATCH, LENGTH, our_step, their_step, tokens_for
from pair import interleave, show

COMMON = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": 1, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 4, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": COMMON | {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "moe_intermediate_size": 128,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 16,
        "q_lora_rank": 128, "kv_lora_rank": 64,
    },
    "132m": COMMON | {
        "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, "moe_intermediate_size": 256,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 32,
        "q_lora_rank": 256, "kv_lora_rank": 128,
    },
}  # fmt: skip
PROMPTS = {"1 x 32": [32], "8 x 32": [32] * 8, "1 x 1024": [1024]}


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
                for texts, lengths in PROMPTS.items():
                    prompts = [list(range(7 + i, 7 + i + n)) for i, n in enumerate(lengths)]
                    ours, theirs = our_run(directory, prompts, tokens), their_run(directory, dtype, prompts, tokens)
                    times = interleave(ours, theirs, rounds)
                    rate = len(prompts) * tokens / times["ours_s"]
                    rows.append({"generate": name, "dtype": dtype, "prompts": texts, "tokens/s": rate, **times})
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
    names = ["tiny"] if options.quick else list(SHAPES)
    if options.only != "generate":
        show(time_training(names, options.rounds), options.json)
    if options.only != "train":
        show(time_generation(names, options.rounds), options.json)


if __name__ == "__main__":
    main()

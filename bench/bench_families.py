"""Families beside transformers: training steps and greedy generation, the same random weights, in one run, A B A B.

    python bench/bench_families.py [--family mamba2] [--size tiny|100m] [--only train|generate] [--dtype bfloat16]
                                   [--rounds 3] [--json]

Training is forward, backward and AdamW on 4 x 512 tokens (one row for the state-space models, of which transformers
keeps every state of the scan for backward). Generation is 64 tokens after prompts of 32, for one and for eight texts;
`long`: after one prompt of 1,024. `mixtral` has eight experts of which a token passes two, `qwen3-moe` 64 and eight.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import torch
from bench_generate import our_run, their_run
from bench_train import our_step, their_step
from pair import interleave, show

Shape = dict[str, Any]
LENGTH = 512
TEXTS = {"1": [32], "8": [32] * 8, "long": [1024]}
MOE = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "router_aux_loss_coef": 0.02}
MOE_TINY = MOE | {
    "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
MOE_100M = MOE | {
    "vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8}
MIXTRAL |= {"num_experts_per_tok": 2}
QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 64, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "head_dim": 64, "intermediate_size": 1024,
    "moe_intermediate_size": 128,
}  # fmt: skip
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": 1, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 4, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False,
}  # fmt: skip
MAMBA = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "state_size": 16}
MAMBA2 = {
    "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "state_size": 128, "n_groups": 1, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
JAMBA = {
    "architectures": ["JambaForCausalLM"], "model_type": "jamba", "max_position_embeddings": 2048, "num_experts": 8,
    "num_experts_per_tok": 2, "num_key_value_heads": 2,
}  # fmt: skip
TINY = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4}
SHAPES: dict[str, dict[str, Shape]] = {
    "mixtral": {
        "tiny": MIXTRAL | MOE_TINY | {"intermediate_size": 512},
        "100m": MIXTRAL | MOE_100M | {"intermediate_size": 1024},
    },
    "qwen3-moe": {"tiny": QWEN3 | MOE_TINY, "100m": QWEN3 | MOE_100M},
    "deepseek-v3": {
        "tiny": DEEPSEEK | TINY | {
            "intermediate_size": 704, "moe_intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4,
            "n_routed_experts": 16, "q_lora_rank": 128, "kv_lora_rank": 64,
        },
        "100m": DEEPSEEK | {
            "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, "moe_intermediate_size": 256,
            "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 32,
            "q_lora_rank": 256, "kv_lora_rank": 128,
        },
    },
    "mamba": {
        "tiny": MAMBA | TINY,
        "100m": MAMBA | {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24},
    },
    "mamba2": {
        "tiny": MAMBA2 | TINY | {"num_heads": 8},
        "100m": MAMBA2 | {"vocab_size": 50288, "hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24},
    },
    "jamba": {
        "tiny": JAMBA | TINY | {
            "intermediate_size": 512, "attn_layer_period": 4, "attn_layer_offset": 2, "num_attention_heads": 4,
        },
        "100m": JAMBA | {
            "vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1024,
            "num_attention_heads": 8,
        },
    },
}  # fmt: skip
ONE_ROW = ("mamba", "mamba2", "jamba")


def time_training(family: str, size: str, dtype: str, rounds: int) -> dict[str, Any]:
    shape, rows = SHAPES[family][size], 1 if family in ONE_ROW else 4
    tokens = torch.randint(0, shape["vocab_size"], (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    kind = getattr(torch, dtype)
    times = interleave(our_step(shape, kind, tokens), their_step(shape, kind, tokens), rounds)
    what = {"family": family, "size": size, "what": "train", "dtype": dtype}
    return {**what, "tokens/s": tokens.numel() / times["ours_s"], **times}


def time_generation(family: str, size: str, dtype: str, rounds: int, tokens: int = 64) -> list[dict[str, Any]]:
    import landmark

    rows = []
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        landmark.save(landmark.build(SHAPES[family][size]).to(getattr(torch, dtype)), directory)
        for texts, lengths in TEXTS.items():
            if texts == "long" and family != "deepseek-v3":
                continue
            prompts = [list(range(7 + i, 7 + i + n)) for i, n in enumerate(lengths)]
            ours, theirs = our_run(directory, prompts, tokens), their_run(directory, dtype, prompts, tokens)
            times = interleave(ours, theirs, rounds)
            what = {"family": family, "size": size, "what": f"generate {texts}", "dtype": dtype}
            rows.append({**what, "tokens/s": len(prompts) * tokens / times["ours_s"], **times})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(SHAPES), action="append", help="default: all")
    parser.add_argument("--size", choices=("tiny", "100m"), action="append", help="default: both")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), action="append", help="default: both")
    parser.add_argument("--only", choices=("train", "generate"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="a line of JSON a row, as they come")
    options = parser.parse_args()
    from transformers.utils import logging

    logging.set_verbosity_error()
    rows: list[dict[str, Any]] = []
    for family in options.family or SHAPES:
        for size in options.size or ("tiny", "100m"):
            for dtype in options.dtype or ("bfloat16", "float32"):
                new = [] if options.only == "generate" else [time_training(family, size, dtype, options.rounds)]
                new += [] if options.only == "train" else time_generation(family, size, dtype, options.rounds)
                rows += new
                if options.json:
                    print(*map(json.dumps, new), sep="\n", flush=True)
    if not options.json:
        show(rows, False)


if __name__ == "__main__":
    main()

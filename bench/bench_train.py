"""Training steps beside transformers: the same random weights, shapes, batch and optimiser, in one run.

    python bench/bench_train.py [--rounds 5] [--json] [--memory]

Time is forward, backward and AdamW on 4 x 512 tokens. Memory is the peak of a process that trains three steps with a
vocabulary of 128,256, measured in a process of its own each.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from pair import interleave, show

SHAPES: dict[str, dict[str, Any]] = {
    "llama-30m": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 384,
        "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 6,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True,
    },
    "gpt2-124m": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12,
        "n_head": 12, "n_positions": 1024, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    },
}  # fmt: skip
BATCH, LENGTH = 4, 512


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def our_step(hf: dict[str, Any], dtype: torch.dtype, tokens: torch.Tensor) -> Callable[[], float]:
    import landmark
    from landmark.data.batches import Batch
    from landmark.objectives.lm import CausalLM

    torch.manual_seed(0)
    model = landmark.build(hf).to(dtype).train()
    opt, objective = optimizer(model.parameters()), CausalLM()
    targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Batch(tokens=tokens, targets=targets, positions=positions, segments=torch.ones_like(tokens))

    def step() -> float:
        loss = objective.loss(model, batch)
        loss.value.backward()
        opt.step()
        opt.zero_grad()
        return float(loss.value.detach())

    return step


def their_step(hf: dict[str, Any], dtype: torch.dtype, tokens: torch.Tensor) -> Callable[[], float]:
    import transformers

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(hf, file)
        file.flush()
        config = transformers.AutoConfig.from_pretrained(file.name)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    opt = optimizer(model.parameters())

    def step() -> float:
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        return float(loss.detach())

    return step


def tokens_for(hf: dict[str, Any]) -> torch.Tensor:
    return torch.randint(0, hf["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def time_all(rounds: int, steps: int) -> list[dict[str, Any]]:
    rows = []
    for name, hf in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            tokens = tokens_for(hf)
            ours, theirs = our_step(hf, dtype, tokens), their_step(hf, dtype, tokens)
            row = interleave(
                lambda f=ours: [f() for _ in range(steps)], lambda f=theirs: [f() for _ in range(steps)], rounds
            )
            rate = BATCH * LENGTH * steps / row["ours_s"]
            rows.append({"model": name, "dtype": str(dtype)[6:], "tokens/s": rate, **row})
    return rows


def peak(which: str, dtype: str) -> float:
    """Peak resident gigabytes of a process that trains three steps."""
    out = subprocess.run([sys.executable, __file__, "--peak", which, dtype], capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def memory() -> list[dict[str, Any]]:
    rows = []
    for dtype in ("bfloat16", "float32"):
        ours, theirs = peak("ours", dtype), peak("theirs", dtype)
        rows.append({"model": "llama-30m, vocabulary 128,256", "dtype": dtype, "ours_gb": ours, "theirs_gb": theirs,
                     "ours/theirs": ours / theirs})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        which, dtype = args.peak
        hf = SHAPES["llama-30m"] | {"vocab_size": 128_256}
        step = (our_step if which == "ours" else their_step)(hf, getattr(torch, dtype), tokens_for(hf))
        for _ in range(3):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2)
        return
    show(memory() if args.memory else time_all(args.rounds, args.steps), args.json)


if __name__ == "__main__":
    main()

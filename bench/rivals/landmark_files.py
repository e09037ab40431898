"""Random weights of a shape, in bfloat16 as a Hugging Face directory, and what Landmark makes of them.

    landmark_files.py SHAPE OUT WAY...

A shape is a published size (`llama3.2-1b`) or one of `SMALL`; a way is one of `landmark.transforms.quantise.WAYS`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import landmark
from landmark.transforms.quantise import quantised
from landmark.weights.checkpoint import describe

CONTEXT = 4096  # more is never asked for, and llama.cpp makes room by it where it is not told
SMALL = {  # a published size, and what of it is smaller
    "tiny": ("llama3.2-1b", {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4096,
    }),
    "tiny-sparse": ("mixtral-8x7b", {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4096,
    }),
    "sparse": ("mixtral-8x7b", {
        "hidden_size": 1024, "intermediate_size": 1792, "num_hidden_layers": 16, "num_attention_heads": 16,
    }),
}  # fmt: skip


def main() -> None:
    shape, out, ways = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    name, smaller = SMALL.get(shape, (shape, {}))
    hf = describe(name)[1] | {"max_position_embeddings": CONTEXT} | smaller
    model = None
    for way in ("bf16", *ways):
        if (out / way).exists():
            continue
        if way == "bf16":
            torch.manual_seed(0)
            torch.set_default_dtype(torch.bfloat16)
            model = landmark.build(hf)
            torch.set_default_dtype(torch.float32)
        elif model is None:
            model = landmark.load(out / "bf16")
        part = out / f"{way}.part"
        landmark.save(model if way == "bf16" else quantised(model, way), part)
        part.rename(out / way)


if __name__ == "__main__":
    main()

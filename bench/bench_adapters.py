"""What LoRA beside the weights costs: steps of decoding and reading, in turns with the same model without adapters.

    python bench/bench_adapters.py [--quick] [--rounds 7] [--bits 8] [--rank 16] [--json]

Ranks of 16 on every linear map of the layers. "none": adapters are there and nobody uses one; "eight": every row of the
batch uses its own. Times are relative to the plain model's in the same round; the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

import landmark
from landmark.models.decoder import Decoder
from landmark.transforms.lora import attach, fresh
from landmark.transforms.quantise import quantise

SHAPE = dict(architectures=["LlamaForCausalLM"], vocab_size=32000, max_position_embeddings=2048, num_hidden_layers=4)
TINY = SHAPE | dict(hidden_size=256, intermediate_size=688, num_attention_heads=4, num_key_value_heads=2)
WIDE = SHAPE | dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8)
MAPS = ("q", "k", "v", "out", "gate", "up", "down")
CASES = {  # sequences, tokens of each, and the number of the adapter of each
    "1 x 1, none": (1, 1, [-1]), "1 x 1, one": (1, 1, [0]), "8 x 1, none": (8, 1, [-1] * 8),
    "8 x 1, one": (8, 1, [0] * 8), "8 x 1, two": (8, 1, [0] * 4 + [1] * 4), "8 x 1, eight": (8, 1, list(range(8))),
    "1 x 256, one": (1, 256, [0]),
}  # fmt: skip


def build(shape: dict[str, Any], bits: int | None) -> Decoder:
    torch.manual_seed(0)
    model: Any = landmark.build(shape).to(torch.bfloat16).eval()
    return model if bits is None else quantise(model, bits)  # type: ignore[return-value, arg-type]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--bits", type=int, choices=(4, 8))
    given = parser.parse_args()
    shape = TINY if given.quick else WIDE
    plain, model = build(shape, given.bits), build(shape, given.bits)
    adapters = attach(model, {str(n): fresh(model, given.rank, 16.0, MAPS) for n in range(8)})

    def step(of: Decoder, rows: int, length: int, numbers: list[int]) -> float:
        tokens, state = torch.zeros(rows, length, dtype=torch.long), of.new_state(rows, 2048)
        took = []
        for _ in range(3):
            began = time.perf_counter()
            with adapters.rows([(number, length) for number in numbers]):
                of.hidden(tokens, state=state)
            took.append(time.perf_counter() - began)
        return min(took)

    figures = []
    for name, (rows, length, numbers) in CASES.items():
        pairs = [
            (step(plain, rows, length, numbers), step(model, rows, length, numbers)) for _ in range(given.rounds + 1)
        ]
        ratio = statistics.median(ours / base for base, ours in pairs[1:])
        figures.append({"case": name, "plain_ms": 1e3 * min(base for base, _ in pairs), "times_plain": ratio})
    if given.json:
        print(json.dumps(figures, indent=2))
        return
    for row in figures:
        print(f"{row['case']:14} plain {row['plain_ms']:8.2f} ms    x {row['times_plain']:.3f}")


if __name__ == "__main__":
    main()

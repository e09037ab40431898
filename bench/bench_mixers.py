"""Every mixer at equal width: tokens per second when training and when decoding, and the bytes that it remembers, as
the text grows.

    python bench/bench_mixers.py [MIXER ...] [--contexts 256 1024 4096 16384] [--rounds 3] [--json] [--write FILE.md]

Two layers of each mixer alone, without feed-forwards, of width 512 and in float32. Training is forward and backward on
one text of that length; decoding is one token more of one text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from pair import seconds, show

from landmark import malloc
from landmark.models.decoder import Decoder
from landmark.models.inspect import count, state_bytes
from landmark.models.pattern import MIXERS, pattern

DIM, VOCAB, LAYERS, CHUNK, STEPS = 512, 256, 2, 1024, 16
Row = dict[str, Any]


def training(model: Decoder, context: int, rounds: int) -> float:
    """Tokens per second of forward and backward."""
    tokens = torch.randint(0, VOCAB, (1, context + 1))

    def step() -> None:
        loss = model.loss(model.hidden(tokens[:, :-1]), tokens[:, 1:]).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    model.train()
    with malloc.kept():  # as in the training loop
        step()
        return context / min(seconds(step) for _ in range(rounds if context <= 4 * CHUNK else 1))


@torch.inference_mode()
def decoding(model: Decoder, context: int) -> float:
    """Tokens per second after `context` tokens."""
    model.eval()
    state = model.new_state(1, context + STEPS)
    for start in range(0, context, CHUNK):
        model(torch.randint(0, VOCAB, (1, min(CHUNK, context - start))), state=state)
    times, token = [], torch.zeros(1, 1, dtype=torch.long)
    for _ in range(STEPS):
        start_s = time.perf_counter()
        model(token, state=state)
        times.append(time.perf_counter() - start_s)
    return 1 / statistics.median(times)


def measure(mixer: str, contexts: list[int], rounds: int) -> Row:
    torch.manual_seed(0)
    model = pattern(f"{LAYERS}*{mixer}/none", dim=DIM, vocab=VOCAB).build()
    row: Row = {"mixer": mixer, "parameters": count(model.layers)}
    row |= {f"train {c}": training(model, c, rounds) for c in contexts}
    row |= {f"decode {c}": decoding(model, c) for c in contexts}
    return row | {f"state {c}": n for c, n in zip(contexts, state_bytes(model, torch.float32, *contexts), strict=True)}


def markdown(rows: list[Row], contexts: list[int]) -> str:
    """Three tables, one row a mixer."""
    kinds = {"train": "Training, tokens/s", "decode": "Decoding, tokens/s", "state": "State of one text, bytes"}
    lines = [
        "# What each mixer costs as the text grows",
        "",
        f"{LAYERS} layers of width {DIM} without feed-forwards, float32, {torch.get_num_threads()} threads; made by "
        "`python bench/bench_mixers.py --write docs/mixers.md`.",
    ]
    for kind, title in kinds.items():
        lines += ["", f"## {title}", "", "| mixer | parameters | " + " | ".join(f"{c:,}" for c in contexts) + " |"]
        lines += ["|---" * (2 + len(contexts)) + "|"]
        for row in rows:
            values = [f"{row[f'{kind} {c}']:,.0f}" for c in contexts]
            lines.append(f"| {row['mixer']} | {row['parameters']:,} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixers", nargs="*", metavar="MIXER", help="names of landmark.models.pattern; none: all")
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, help="a Markdown file")
    arguments = parser.parse_args()
    distinct = {(part.module, part.name, part.fields): name for name, part in reversed(MIXERS.items())}
    rows = [
        measure(name, arguments.contexts, arguments.rounds)
        for name in arguments.mixers or [name for name in MIXERS if name in distinct.values()]
    ]
    if arguments.write:
        arguments.write.write_text(markdown(rows, arguments.contexts), encoding="utf-8")
    elif arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows, False)


if __name__ == "__main__":
    main()

"""Everything that needs a GPU, in one run: correctness of each family on it, then timings beside transformers.

    python bench/gpu.py [--device cuda] [--quick] > gpu.json

Checks: every tiny golden decoder gives on the device what it gives on the CPU (float32, TF32 off), decodes step by step
as it does at once, and keeps packed documents apart. Timings: training steps and decoding, interleaved with the peer's.
`--device cpu --quick` runs the same code anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import landmark
from landmark.data.batches import Batch
from landmark.infer.session import Session
from landmark.models.decoder import Decoder
from landmark.models.registry import families, published
from landmark.objectives.lm import CausalLM

TINY = Path(__file__).parent.parent / "tests" / "golden" / "tiny"


def tiny(architecture: str) -> dict[str, Any]:
    """The config.json of a tiny model."""
    name = families()[architecture].name
    return {"architectures": [architecture], "model_type": name, **json.loads((TINY / f"{name}.json").read_text())}


@torch.inference_mode()
def check(architecture: str, device: str) -> dict[str, Any] | None:
    torch.manual_seed(0)
    model = landmark.build(tiny(architecture))
    if not isinstance(model, Decoder):
        return None
    for p in model.parameters():
        p += torch.randn_like(p) * 0.05
    model.eval()
    tokens = torch.randint(0, model.cfg.embed.vocab, (2, 19))
    want = model(tokens)
    model.to(device)
    there = tokens.to(device)

    def error(got: torch.Tensor, expected: torch.Tensor) -> float:
        return ((got.cpu() - expected).abs().max() / expected.abs().max()).item()

    session = Session(model, 2, 19)
    last = session.extend(tokens[:, :7].tolist())
    for t in range(7, 19):
        last = session.extend(tokens[:, t : t + 1].tolist())
    segments = torch.ones_like(there)
    segments[:, 11:] = 2
    packed = model(there, segments=segments)
    alone = torch.cat([model(there[:, :11]), model(there[:, 11:])], 1)
    errors = {
        "forward": error(model(there), want),
        "decode": error(last, want[:, -1]),
        "packed": error(packed, alone.cpu()),
    }
    return {"model": architecture, **errors, "ok": max(errors.values()) < 1e-4}


def clock(run: Callable[[], object], device: str, rounds: int) -> float:
    """Best seconds of several runs."""
    best = float("inf")
    for _ in range(rounds):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def peer(hf: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    import tempfile

    import transformers

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(hf, file)
        file.flush()
        config = transformers.AutoConfig.from_pretrained(file.name)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)


def train(name: str, hf: dict[str, Any], device: str, rows: int, length: int) -> dict[str, Any]:
    tokens = torch.randint(0, hf["vocab_size"], (rows, length), device=device)
    targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)
    positions = torch.arange(length, device=device).expand(rows, -1)
    batch = Batch(tokens=tokens, targets=targets, positions=positions, segments=torch.ones_like(tokens))
    ours, theirs = landmark.build(hf).to(device, torch.bfloat16).train(), peer(hf, torch.bfloat16, device).train()
    objective = CausalLM()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (ours, theirs)]

    def step(which: int) -> None:
        loss = objective.loss(ours, batch).value if which == 0 else theirs(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizers[which].step()
        optimizers[which].zero_grad()

    step(0), step(1)
    times = [[clock(lambda w=w: step(w), device, 3) for w in (0, 1)] for _ in range(3)]
    a, b = (min(pair[w] for pair in times) for w in (0, 1))
    return {"train": name, "tokens/s": rows * length / a, "speedup": b / a}


@torch.inference_mode()
def decode(name: str, hf: dict[str, Any], device: str, batch: int, new: int) -> dict[str, Any]:
    from landmark.infer.generate import generate
    from landmark.infer.sampling import Sampling

    ours, theirs = landmark.build(hf).to(device, torch.bfloat16).eval(), peer(hf, torch.bfloat16, device).eval()
    prompts = torch.randint(0, hf["vocab_size"], (batch, 32)).tolist()
    sampling = Sampling(temperature=0.0, max_tokens=new)
    inputs = torch.tensor(prompts, device=device)

    def run_ours() -> None:
        generate(ours, prompts, sampling)

    def run_theirs() -> None:
        theirs.generate(inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    run_ours(), run_theirs()
    times = [(clock(run_ours, device, 1), clock(run_theirs, device, 1)) for _ in range(3)]
    a, b = min(t[0] for t in times), min(t[1] for t in times)
    return {"decode": name, "batch": batch, "tokens/s": batch * new / a, "speedup": b / a}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, Any]] = [row for name in sorted(families()) if (row := check(name, args.device))]
    if args.quick:
        small = tiny("LlamaForCausalLM")
        rows += [train("tiny", small, args.device, 2, 32), decode("tiny", small, args.device, 2, 8)]
    else:
        gpt2, llama = published("gpt2")[1], published("llama3.2-1b")[1]
        rows += [train("gpt2", gpt2, args.device, 16, 1024), train("llama3.2-1b", llama, args.device, 4, 2048)]
        rows += [decode(n, h, args.device, b, 128) for n, h in (("gpt2", gpt2), ("llama3.2-1b", llama)) for b in (1, 8)]
    print(json.dumps(rows, indent=2))
    sys.exit(0 if all(row.get("ok", True) for row in rows) else 1)


if __name__ == "__main__":
    main()

"""What every mixer with a state of its own must pass, whatever is inside."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

import landmark
from landmark.config import ModuleConfig
from landmark.data.synthetic import MQAR
from landmark.infer.generate import generate
from landmark.infer.sampling import Sampling
from landmark.models.base import Init
from landmark.models.decoder import Decoder
from landmark.models.inspect import figures, state_bytes
from landmark.objectives.lm import CausalLM
from landmark.papers.small import decoder
from tests.models.families import check_decoding, check_packing, perturb

TASK = MQAR(pairs=4, length=32, symbols=16)


def small(mixer: ModuleConfig, dim: int = 32, layers: int = 2) -> Decoder:
    with torch.device("meta"):
        config = decoder(mixers=[mixer] * layers, dim=dim, vocab=TASK.vocab).cfg
    torch.manual_seed(0)
    return replace(config, init=Init(std=None, embedding=1.0)).build()  # 0.02 is little for so small a width


def check_sequences(mixer: ModuleConfig, length: int = 23) -> None:
    """Packed == alone; decoding, in steps of any size, ragged, restored and reordered == forward."""
    model = small(mixer).eval()
    perturb(model)
    tokens = torch.randint(0, TASK.vocab, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        check_packing(model, tokens)
        check_decoding(model, tokens, model(tokens))


def check_state_is_constant(mixer: ModuleConfig) -> None:
    """Decoding takes as much memory and work after a thousand tokens as after a hundred."""
    with torch.device("meta"):
        model = small(mixer)
    short, long = state_bytes(model, torch.float32, 100, 1000)
    assert short == long > 0
    assert figures(model, context=1000).flops == figures(model, context=100).flops > 0


def check_learns(mixer: ModuleConfig, directory: Path, steps: int = 60) -> None:
    """The loss of a small recall task falls clearly below that of one who guesses among the values; what was learned
    is saved, loaded by a process that has seen none of it, and written on with."""
    model = small(mixer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = CausalLM().loss(model, TASK.batch(16, step)).value
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.9 * math.log(TASK.symbols / 2), losses
    model.eval()
    landmark.save(model, directory)
    prompt = TASK.batch(1, 0).tokens[0, :13].tolist()
    answer = generate(model, [prompt, prompt[:5]], Sampling(max_tokens=9, temperature=0.0, stop_ids=frozenset()))
    code = (
        "import sys, landmark\n"
        "from landmark.infer.generate import generate\n"
        "from landmark.infer.sampling import Sampling\n"
        f"model = landmark.load(sys.argv[1])\n"
        f"print(generate(model, [{prompt}], Sampling(max_tokens=9, temperature=0.0, stop_ids=frozenset()))[0].tokens)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(answer[0].tokens), done.stdout + done.stderr
    assert len(answer[1].tokens) == 9

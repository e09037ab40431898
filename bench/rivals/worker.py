"""What every program answers, a JSON line for a JSON line, so that programs of different Pythons run in turn.

Each rival is a process of its own with the few functions of `Runner`; this file needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol


class Runner(Protocol):
    """A model that reads prompts and goes on greedily."""

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Forget everything, read prompts of one length -> the likeliest token after each."""
        ...

    def step(self, tokens: Sequence[int]) -> list[int]:
        """One more token of every sequence -> the likeliest after each."""
        ...

    def logits(self, prompt: Sequence[int]) -> Sequence[float]:
        """Of what follows a prompt, [vocab]."""
        ...


def answer(runner: Runner, ask: dict[str, Any]) -> dict[str, Any]:
    """`decode`: seconds of `steps` tokens after prompts that were read before; `prefill`: seconds of reading them;
    `logits`: written to a file as float32; `memory`: the most bytes that were resident, and those that are."""
    if ask["do"] == "decode" and hasattr(runner, "decode"):  # a loop of its own, of which it tells the seconds
        return {"seconds": runner.decode(ask["prompts"], ask["steps"])}
    if ask["do"] == "decode":
        tokens = runner.start(ask["prompts"])
        began = time.perf_counter()
        for _ in range(ask["steps"]):
            tokens = runner.step(tokens)
        return {"seconds": time.perf_counter() - began}
    if ask["do"] == "prefill":
        began = time.perf_counter()
        runner.start(ask["prompts"])
        return {"seconds": time.perf_counter() - began}
    if ask["do"] == "logits":
        Path(ask["file"]).write_bytes(array("f", runner.logits(ask["prompt"])).tobytes())
        return {}
    if ask["do"] == "memory":
        return memory()
    raise ValueError(f"unknown request {ask['do']!r}: decode, prefill, logits or memory")


def memory() -> dict[str, Any]:
    """Linux only: bytes of this process, the most that were resident and what is, of which mapped from files."""
    said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = {"peak": "VmHWM", "resident": "VmRSS", "files": "RssFile"}
    return {name: int(said[key].split()[0]) * 1024 for name, key in kib.items()}


def replies() -> IO[str]:
    """Where answers go; what libraries print goes to stderr instead."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return out


def serve(runner: Runner, out: IO[str]) -> None:
    """Say that the model is there, then answer until there are no more requests."""
    print(json.dumps({"ready": True}), file=out)
    for line in sys.stdin:
        print(json.dumps(answer(runner, json.loads(line))), file=out)

"""Landmark, as `generate` drives it: `landmark_worker.py DIRECTORY THREADS SLOTS CAPACITY`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from worker import replies, serve

import landmark
from landmark.infer.session import Session
from landmark.models.decoder import Decoder


class Ours:
    def __init__(self, directory: str, capacity: int) -> None:
        model = landmark.load(directory)
        assert isinstance(model, Decoder)
        self.model, self.capacity = model.eval(), capacity

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        self.session = Session(self.model, len(prompts), self.capacity)
        return self._extend(prompts)

    def step(self, tokens: Sequence[int]) -> list[int]:
        return self._extend([[token] for token in tokens])

    def _extend(self, rows: Sequence[Sequence[int]]) -> list[int]:
        found: list[int] = self.session.extend(rows).float().argmax(-1).tolist()
        return found

    def logits(self, prompt: Sequence[int]) -> list[float]:
        self.start([prompt[:-1]])
        found: list[float] = self.session.extend([prompt[-1:]])[0].float().tolist()
        return found


if __name__ == "__main__":
    out = replies()
    torch.set_num_threads(int(sys.argv[2]))
    serve(Ours(sys.argv[1], int(sys.argv[4])), out)

"""transformers, its model called in a plain loop, which is less than `generate` does; or with --generate by that:
`transformers_worker.py DIRECTORY THREADS SLOTS CAPACITY [--generate]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from worker import replies, serve


class Transformers:
    def __init__(self, directory: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()

    @torch.inference_mode()
    def _extend(self, rows: Sequence[Sequence[int]]) -> Tensor:
        out = self.model(torch.tensor(rows), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        self.cache = DynamicCache(config=self.model.config)
        found: list[int] = self._extend(prompts).argmax(-1).tolist()
        return found

    def step(self, tokens: Sequence[int]) -> list[int]:
        found: list[int] = self._extend([[token] for token in tokens]).argmax(-1).tolist()
        return found

    def logits(self, prompt: Sequence[int]) -> list[float]:
        self.start([prompt[:-1]])
        found: list[float] = self._extend([prompt[-1:]])[0].float().tolist()
        return found


class Generate(Transformers):
    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Seconds of `steps` more tokens than one."""
        tokens, taken = torch.tensor(prompts), []
        for count in (1, steps + 1):
            began = time.perf_counter()
            self.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, min_new_tokens=count,
                max_new_tokens=count, pad_token_id=0,
            )  # fmt: skip
            taken.append(time.perf_counter() - began)
        return taken[1] - taken[0]


if __name__ == "__main__":
    out = replies()
    torch.set_num_threads(int(sys.argv[2]))
    kind = Generate if sys.argv[5:] == ["--generate"] else Transformers
    serve(kind(sys.argv[1]), out)

"""llama.cpp through llama-cpp-python's low-level API: `llama_worker.py FILE.gguf THREADS SLOTS CAPACITY`."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import llama_cpp
import numpy as np
from worker import replies, serve


class Llama:
    """Its defaults, but for threads, sequences and their length: weights mapped, keys and values in float16."""

    def __init__(self, file: str, threads: int, slots: int, capacity: int) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise ValueError(f"llama.cpp cannot load {file}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = slots * capacity, slots
        params.n_threads = params.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise ValueError(f"llama.cpp cannot make a context of {slots} x {capacity} tokens")
        self.context, self.at_once = context, min(params.n_batch, slots * capacity)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(self.at_once, 0, 1)
        self.length = 0

    def _extend(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """All sequences by as many tokens each -> logits [vocab] of their last ones."""
        batch, n, width = self.batch, 0, len(rows[0])
        if len(rows) * width > self.at_once:
            raise ValueError(f"{len(rows)} x {width} tokens are more than a batch of {self.at_once}")
        for row, tokens in enumerate(rows):
            for at, token in enumerate(tokens):
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, self.length + at, 1
                batch.seq_id[n][0], batch.logits[n] = row, at == width - 1
                n += 1
        batch.n_tokens = n
        if (code := llama_cpp.llama_decode(self.context, batch)) != 0:
            raise RuntimeError(f"llama_decode says {code}")
        self.length += width
        ends = [width * (row + 1) - 1 for row in range(len(rows))]
        found = [llama_cpp.llama_get_logits_ith(self.context, end) for end in ends]
        floats = ctypes.POINTER(ctypes.c_float)
        return [np.ctypeslib.as_array(ctypes.cast(each, floats), (self.vocab,)) for each in found]

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.length = 0
        return self.step_of(prompts)

    def step(self, tokens: Sequence[int]) -> list[int]:
        return self.step_of([[token] for token in tokens])

    def step_of(self, rows: Sequence[Sequence[int]]) -> list[int]:
        return [int(each.argmax()) for each in self._extend(rows)]

    def logits(self, prompt: Sequence[int]) -> list[float]:
        self.start([prompt[:-1]])
        return [float(x) for x in self._extend([prompt[-1:]])[0]]


if __name__ == "__main__":
    out = replies()
    serve(Llama(sys.argv[1], *map(int, sys.argv[2:5])), out)

"""OpenVINO's runtime on a model that its GenAI read: `openvino_worker.py DIRECTORY THREADS SLOTS CAPACITY`.

As GenAI does, only the last position meets the head, and keys and values are a state of the model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import openvino
from openvino import opset13
from worker import replies, serve


def last_only(model: openvino.Model) -> None:
    """The product that makes the logits reads the last position of [batch, tokens, dim]."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    ends = (np.array(n, dtype=np.int64) for n in ([-1], [np.iinfo(np.int64).max], [1], [1]))
    part = opset13.slice(node.input_value(0), *ends)
    node.input(0).replace_source_output(part.output(0))


class OpenVINO:
    def __init__(self, directory: str, threads: int) -> None:
        core = openvino.Core()
        model = core.read_model(f"{directory}/openvino_model.xml")
        last_only(model)
        names = {name for each in model.inputs for name in each.names}
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.request = core.compile_model(model, "CPU", settings).create_infer_request()
        self.positions = "position_ids" in names
        self.length = 0

    def start(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        self.request.reset_state()
        self.length = 0
        return self._likeliest(prompts)

    def step(self, tokens: Sequence[int]) -> list[int]:
        return self._likeliest([[token] for token in tokens])

    def _likeliest(self, rows: Sequence[Sequence[int]]) -> list[int]:
        found: list[int] = self._extend(rows).argmax(-1).tolist()
        return found

    def _extend(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """All sequences by as many tokens each -> logits [sequences, vocab] of their last ones."""
        ids = np.array(rows, dtype=np.int64)
        count, width = ids.shape
        past, self.length = self.length, self.length + width
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((count, self.length), dtype=np.int64),
            "beam_idx": np.arange(count, dtype=np.int32),
        }
        if self.positions:
            feed["position_ids"] = np.broadcast_to(np.arange(past, self.length), ids.shape).copy()
        self.request.infer(feed)
        logits: np.ndarray = self.request.get_tensor("logits").data[:, -1]
        return logits

    def logits(self, prompt: Sequence[int]) -> list[float]:
        self.start([prompt[:-1]])
        return [float(x) for x in self._extend([prompt[-1:]])[0]]


if __name__ == "__main__":
    out = replies()
    serve(OpenVINO(sys.argv[1], int(sys.argv[2])), out)

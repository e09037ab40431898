"""RWKV-4 (Peng et al. 2023), -5 and -6 (Eagle and Finch, 2024) and -7 (2025): one model, trained in parallel and
decoded as a recurrence whose memory does not grow."""

from __future__ import annotations

import torch

from ...models.decoder import Decoder
from ...models.inspect import state_bytes
from ...models.pattern import pattern
from ..experiment import Curve, Experiment, Finding, Outcome, Plot, Verdict, equal, reaches
from ..lab import Cell, Lab, column

VERSIONS = {
    "rwkv4": ("RWKV-4", "2305.13048, sec. 3.2 and 3.3"),
    "rwkv5": ("RWKV-5", "2404.05892, sec. 3"),
    "rwkv6": ("RWKV-6", "2404.05892, sec. 3"),
    "rwkv7": ("RWKV-7", "2503.14456, sec. 4"),
}
DIM, VOCAB, LENGTH = 64, 64, 96
CONTEXTS = [2**n for n in range(8, 17)]


def small(mixer: str) -> Decoder:
    """Two layers of it, with what usually follows them."""
    return pattern(f"2*{mixer}", dim=DIM, vocab=VOCAB).build()


@torch.inference_mode()
def read(version: str, seed: int) -> Cell:
    """A random text in float64, read at once and token by token; weights are far from where their initialisation puts
    them, as that has parts which do nothing yet."""
    torch.manual_seed(seed)
    model = small(version).double().eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    tokens = torch.randint(VOCAB, (2, LENGTH))
    parallel = model(tokens)

    def recurrent(*, forgets: bool) -> torch.Tensor:
        state, said = model.new_state(2, LENGTH), []
        for t in range(LENGTH):
            if forgets and t == LENGTH // 2:
                state = model.new_state(2, LENGTH)
            said.append(model(tokens[:, t : t + 1], state=state))
        return torch.cat(said, 1)

    def apart(other: torch.Tensor) -> float:
        return ((other - parallel).abs().max() / parallel.abs().max()).item()

    return {"recurrent": apart(recurrent(forgets=False)), "forgetting": apart(recurrent(forgets=True))}


def run(lab: Lab) -> Outcome:
    seeds = range(50) if lab.full else lab.seeds
    cells = lab.grid(read, [{"version": v, "seed": s} for v in VERSIONS for s in seeds])
    memory = {v: state_bytes(small(v), torch.float32, *CONTEXTS) for v in (*VERSIONS, "attention")}
    findings = []
    for version, (name, source) in VERSIONS.items():
        sizes = memory[version]
        findings += [
            equal(
                f"{name}: the parallel form says what the recurrence says", source,
                f"logits of {len(seeds)} models on texts of {LENGTH} tokens in float64",
                max(column(cells, "recurrent", version=version)), 1e-11,
            ),
            Finding(
                f"{name}: memory in decoding does not depend on the length of the text", source,
                f"state of {sizes[0]:,} bytes at {CONTEXTS[0]} tokens and {sizes[-1]:,} at {CONTEXTS[-1]:,}",
                Verdict.shown if len(set(sizes)) == 1 else Verdict.contradicted,
            ),
        ]  # fmt: skip
    grown = memory["attention"][-1] / memory["attention"][0]
    findings += [
        *(
            reaches(
                f"{name}: a recurrence that forgets its state half-way says something else", "ours",
                "relative change of the logits", column(cells, "forgetting", version=version), 1e-3, control=True,
            )
            for version, (name, _) in VERSIONS.items()
        ),
        reaches(
            "attention's memory, measured in the same way, does grow with the text", "ours",
            f"times its size at {CONTEXTS[0]} tokens that it has at {CONTEXTS[-1]:,}", [grown], 100, control=True,
        ),
    ]  # fmt: skip
    table = [
        {
            "mixer": name,
            "largest difference of the forms": max(column(cells, "recurrent", version=name), default="-"),
            **{f"bytes at {n:,}": size for n, size in zip(CONTEXTS, sizes, strict=True) if n in (256, 4096, 65536)},
        }
        for name, sizes in memory.items()
    ]
    curves = [Curve(name, CONTEXTS, [sizes]) for name, sizes in memory.items()]
    plot = Plot(f"Two layers of width {DIM}", "tokens", "bytes of state", curves, log_x=True, log_y=True)
    return Outcome(findings, table, plot, "Weights are random; the equality is one of the forms, whatever is learned.")


EXPERIMENT = Experiment("A1", "rwkv", "A recurrence that trains in parallel and decodes in flat memory", run, 0.5)

"""Multi-head latent attention (DeepSeek-V2, 2024): one short vector a token is kept, and nothing is lost."""

from __future__ import annotations

from typing import Any

import torch

from ...models.inspect import figures
from ...nn.latent import LatentAttention
from ...weights.checkpoint import describe
from ..experiment import Experiment, Outcome, equal, reaches
from ..lab import Cell, Lab, column
from ..small import decoder

DIM, LAYERS, VOCAB, LENGTH, PROMPT = 48, 2, 64, 64, 9
MIXERS = {
    "compressed queries": LatentAttention.Config(heads=4, kv_rank=16, q_rank=24, head_dim=12, rope_dim=8, v_dim=20),
    "plain queries": LatentAttention.Config(heads=4, kv_rank=16, head_dim=12, rope_dim=8, v_dim=20),
}
PUBLISHED = ("deepseek-67b", "deepseek-v2", "deepseek-v3")


@torch.inference_mode()
def decode(variant: str, seed: int) -> Cell:
    """A random text in float64: keys and values of every head at once, and token by token from the latent."""
    model = decoder(mixers=[MIXERS[variant]] * LAYERS, dim=DIM, vocab=VOCAB, seed=seed).double().eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    tokens = torch.randint(VOCAB, (2, LENGTH))
    expanded = model(tokens)

    def absorbed(*, loses_position: bool) -> torch.Tensor:
        state = model.new_state(2, LENGTH)
        said = [model(tokens[:, :PROMPT], state=state)]
        for t in range(PROMPT, LENGTH):
            if loses_position and t == LENGTH // 2:
                forget_rotary(state)
            said.append(model(tokens[:, t : t + 1], state=state))
        return torch.cat(said, 1)

    def apart(other: torch.Tensor) -> float:
        return ((other - expanded).abs().max() / expanded.abs().max()).item()

    return {"absorbed": apart(absorbed(loses_position=False)), "without": apart(absorbed(loses_position=True))}


def forget_rotary(state: Any) -> None:
    """Nothing is left of the shared keys that carry the position."""
    for layer in state.layers:
        layer["mixer"].k[..., MIXERS["plain queries"].kv_rank :] = 0


def run(lab: Lab) -> Outcome:
    seeds = range(50) if lab.full else lab.seeds
    cells = lab.grid(decode, [{"variant": v, "seed": s} for v in MIXERS for s in seeds])
    found = {}
    for name in PUBLISHED:
        with torch.device("meta"):
            model: Any = describe(name)[0].build()
        found[name] = figures(model)
    per_token = {name: found[name].cache_per_token or 0 for name in PUBLISHED}
    dense, v2, v3 = (per_token[name] for name in PUBLISHED)
    saved = 100 * (1 - v2 * 6 / 16 / dense)
    groups = v2 / found["deepseek-v2"].layers / (2 * 2 * 128)  # a group: keys and values of 128 dimensions, two bytes
    findings = [
        *(
            equal(
                f"decoding with absorbed matrices says what keys and values of every head say ({variant})",
                "sec. 2.1.2, appendix C", f"logits of {len(seeds)} models on texts of {LENGTH} tokens in float64",
                max(column(cells, "absorbed", variant=variant)), 1e-11,
            )
            for variant in MIXERS
        ),
        equal(
            "DeepSeek-V3 keeps 70,272 bytes a token in bfloat16", "2505.09343, table 1",
            f"{v3:,} bytes, measured on its decoding state", abs(v3 / 70_272 - 1), 0.0,
        ),
        equal(
            "DeepSeek-V2's cache is 93.3% smaller than that of DeepSeek 67B, in the 6 bits it is deployed with",
            "abstract and sec. 3.2.3", f"{saved:.1f}% less: {v2:,} bytes a token in 16 bits against {dense:,}",
            abs(round(saved, 1) - 93.3), 1e-9,
        ),
        equal(
            "a layer of DeepSeek-V2 keeps as much as grouped-query attention with 2.25 groups", "table 1",
            f"{groups:g} groups of keys and values", abs(groups / 2.25 - 1), 1e-12,
        ),
        reaches(
            "a cache that loses the shared rotary keys half-way says something else", "ours",
            "relative change of the logits", column(cells, "without"), 1e-3, control=True,
        ),
    ]  # fmt: skip
    table = [{"model": n, "bytes a token in bfloat16": per_token[n], "layers": found[n].layers} for n in PUBLISHED]
    return Outcome(
        findings, table, note="Weights of the small models are random; of the large ones only the structure is built."
    )


EXPERIMENT = Experiment("E8", "deepseek-v2", "A latent vector a token instead of keys and values", run, 0.5)

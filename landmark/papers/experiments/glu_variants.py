"""GLU variants improve Transformer (Shazeer 2020): gated feed-forwards against plain ones, at equal size."""

from __future__ import annotations

from ...config import ModuleConfig
from ...models.inspect import count
from ...nn.feedforward import GLU, MLP
from ..experiment import Experiment, Outcome, exceeds
from ..lab import Cell, Lab, column
from ..learn import learn, loss
from ..small import decoder
from ..text import ByteText, held_out

HIDDEN = 384  # of the plain feed-forward; a gated one has two thirds of it (sec. 2)
PLAIN: dict[str, ModuleConfig] = {
    "ReLU": MLP.Config(hidden=HIDDEN, act="relu", bias=False),
    "GELU": MLP.Config(hidden=HIDDEN, act="gelu", bias=False),
    "Swish": MLP.Config(hidden=HIDDEN, act="silu", bias=False),
}
GATED: dict[str, ModuleConfig] = {
    "GLU": GLU.Config(hidden=HIDDEN * 2 // 3, act="sigmoid"),
    "Bilinear": GLU.Config(hidden=HIDDEN * 2 // 3, act="identity"),
    "ReGLU": GLU.Config(hidden=HIDDEN * 2 // 3, act="relu"),
    "GEGLU": GLU.Config(hidden=HIDDEN * 2 // 3, act="gelu"),
    "SwiGLU": GLU.Config(hidden=HIDDEN * 2 // 3, act="silu"),
}
CONTROL: dict[str, ModuleConfig] = {"linear": MLP.Config(hidden=HIDDEN, act="identity", bias=False)}


def train_variant(variant: str, steps: int, seed: int) -> Cell:
    """A small decoder over bytes with this feed-forward."""
    model = decoder({**PLAIN, **GATED, **CONTROL}[variant], dim=96, layers=3, seed=seed)
    learn(model, ByteText(16, 128, seed), steps=steps, lr=3e-3, seed=seed)
    return {"nats": loss(model, held_out(256, 128)), "parameters": count(model)}


def run(lab: Lab) -> Outcome:
    steps = 3000 if lab.full else 500
    names = [*PLAIN, *GATED, *CONTROL]
    cells = lab.grid(train_variant, [{"variant": v, "steps": steps, "seed": s} for s in lab.seeds for v in names])
    nats = {name: column(cells, "nats", variant=name) for name in names}
    findings = [
        exceeds(
            f"{name} has a lower held-out loss than a ReLU feed-forward of as many parameters", "table 1",
            f"nats per byte of ReLU and {name}", nats["ReLU"], nats[name],
        )
        for name in ("GEGLU", "SwiGLU", "ReGLU", "Bilinear", "GLU")
    ]  # fmt: skip
    best, gated = (min(kind, key=lambda name: sum(nats[name])) for kind in (PLAIN, GATED))
    findings += [
        exceeds(
            "the best gated variant beats the best plain one", "table 1", f"nats per byte of {best} and {gated}",
            nats[best], nats[gated],
        ),
        exceeds(
            "a feed-forward without any non-linearity is worse: the loss tells feed-forwards apart", "ours",
            "nats per byte of linear and ReLU", nats["linear"], nats["ReLU"], control=True,
        ),
    ]  # fmt: skip
    table = [
        {
            "variant": n,
            "nats per byte": sum(nats[n]) / len(nats[n]),
            "parameters": column(cells, "parameters", variant=n)[0],
        }
        for n in names
    ]
    return Outcome(findings, table, note=f"{steps} updates of 2,048 bytes; all variants see the same batches.")


EXPERIMENT = Experiment(
    "E14", "glu-variants", "Gated feed-forwards beat plain ones at equal parameters", run, minutes=8
)

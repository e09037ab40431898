"""Learning to (learn at test time) (Sun et al. 2024): with one batch, TTT-Linear is linear attention; with
mini-batches, a longer context keeps helping."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ctx import Bounds
from ...models.decoder import Decoder
from ...models.pattern import pattern
from ...ops.ttt import Backend, ttt
from ..experiment import Curve, Experiment, Outcome, Plot, equal, exceeds, reaches, stays_below
from ..lab import Cell, Lab, column
from ..learn import learn
from ..text import VOCAB, ByteText, held_out

LENGTH, SHORT, BINS = 256, 32, 8
SOURCE = "theorem 1"


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """y_t = sum over s <= t of (k_s q_t) v_s, for every head of [B, T, heads, d]."""
    scores = torch.einsum("bthd,bshd->bhts", q, k).tril()
    return torch.einsum("bhts,bshd->bthd", scores, v)


def compare(batch: int, seed: int) -> Cell:
    """TTT-Linear from W_0 = 0 with mini-batches of so many tokens and a rate of 1/2, on the paper's loss |Wk - v|^2
    (twice that of `ttt`), beside linear attention, in float64: outputs and gradients."""
    torch.manual_seed(seed)
    heads, d, length = 3, 16, 64
    q, k, v = views = torch.randn(3, 2, length, heads, d, dtype=torch.float64).requires_grad_().unbind()
    rate = torch.ones(2, length, heads, dtype=torch.float64)
    start = (torch.zeros(heads, d, d, dtype=torch.float64),)
    weight = torch.randn(2, length, heads, d, dtype=torch.float64)
    found: Cell = {}
    theirs = linear_attention(q, k, v)
    slopes = torch.autograd.grad((theirs * weight).sum(), views)
    forms: tuple[Backend, ...] = ("dual", "reference")
    for form in forms:
        scale = torch.ones(batch, dtype=torch.float64)
        ours, _ = ttt(q, k, v, start, rate, scale, bounds=Bounds(2, length), backend=form)
        found[form] = apart(ours, theirs)
        if form == "dual":
            pairs = zip(torch.autograd.grad((ours * weight).sum(), views), slopes, strict=True)
            found["gradients"] = max(apart(a, b) for a, b in pairs)
    return found


def apart(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def reader(mixer: str, seed: int) -> Decoder:
    torch.manual_seed(seed)
    return pattern(f"2*{mixer}", dim=64, vocab=VOCAB).build()


@torch.inference_mode()
def nats(model: Decoder, tokens: Tensor, targets: Tensor) -> Tensor:
    """-log p of every target, [B, T]."""
    return -model.eval().logprobs(model.hidden(tokens), targets)


def train_reader(mixer: str, steps: int, rows: int, seed: int) -> Cell:
    """A small decoder over bytes; its held-out loss on the last bytes of texts: seen in full, the end alone,
    the end behind another text."""
    model = reader(mixer, seed)
    learn(model, ByteText(8, LENGTH, seed), steps=steps, lr=5e-3, seed=seed)
    text = held_out(rows, LENGTH)
    whole = nats(model, text.tokens, text.targets)
    end = nats(model, text.tokens[:, -2 * SHORT :], text.targets[:, -2 * SHORT :])
    strange = torch.cat([text.tokens[:, : -2 * SHORT].roll(1, 0), text.tokens[:, -2 * SHORT :]], 1)
    return {
        "whole": whole[:, -SHORT:].mean().item(),
        "strange": nats(model, strange, text.targets)[:, -SHORT:].mean().item(),
        "end": end[:, -SHORT:].mean().item(),
        "curve": whole.view(rows, BINS, -1).mean((0, 2)).tolist(),
    }


def run(lab: Lab) -> Outcome:
    steps, rows = (3000, 512) if lab.full else (400, 256)
    rows = 8 if lab.quick else rows
    same = lab.grid(compare, [{"batch": b, "seed": s} for b in (64, 16) for s in lab.seeds])
    cells = lab.grid(train_reader, [{"mixer": "ttt", "steps": steps, "rows": rows, "seed": s} for s in lab.seeds])
    what = f"outputs on {len(lab.seeds)} random texts of 64 tokens in float64"
    findings = [
        equal(
            "with batch gradient descent, TTT-Linear is linear attention (primal form)", SOURCE, what,
            max(column(same, "reference", batch=64)), 1e-12,
        ),
        equal(
            "so is its dual form, in which it trains", SOURCE, what, max(column(same, "dual", batch=64)), 1e-12,
        ),
        equal(
            "and so are the gradients", SOURCE, "those of queries, keys and values",
            max(column(same, "gradients", batch=64)), 1e-12,
        ),
        exceeds(
            "a longer context helps: the same bytes are easier with more of the text before them", "figure 2, right",
            f"nats per byte of the last {SHORT} with {SHORT} to {2 * SHORT} and with {LENGTH - SHORT} to {LENGTH} "
            "bytes of context", column(cells, "end"), column(cells, "whole"),
        ),
        reaches(
            "with mini-batches of 16 it is something else than linear attention", "ours", "relative change",
            column(same, "dual", batch=16), 1e-2, control=True,
        ),
        exceeds(
            "another text before them does not do that", "ours",
            "nats per byte behind another text and behind their own",
            column(cells, "strange"), column(cells, "whole"), control=True,
        ),
        stays_below(
            "the small model has learned: a model of single bytes has more than 3 nats", "ours",
            "held-out nats per byte", column(cells, "whole"), 2.7, control=True,
        ),
    ]  # fmt: skip
    table = [
        {
            "mini-batch": b,
            "primal against linear attention": max(column(same, "reference", batch=b)),
            "dual": max(column(same, "dual", batch=b)),
            "gradients": max(column(same, "gradients", batch=b)),
        }
        for b in (64, 16)
    ]
    middle = [(i + 0.5) * LENGTH / BINS for i in range(BINS)]
    plot = Plot(
        "Held-out loss by position", "position", "nats per byte",
        [Curve("TTT-Linear", middle, [c["curve"] for c in cells])],
    )  # fmt: skip
    return Outcome(findings, table, plot, f"{steps} updates of 2,048 bytes in rows of {LENGTH}.")


EXPERIMENT = Experiment("A4", "ttt", "Learning by one batch is linear attention, and longer contexts help", run, 3)

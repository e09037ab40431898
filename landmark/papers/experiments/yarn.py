"""Longer contexts for a trained model: position interpolation (Chen et al. 2023), NTK-aware bases, YaRN (Peng et al.
2023), used as they are and after a short tuning, by a byte model that is read four times as far as it was trained."""

from __future__ import annotations

import torch
from torch import Tensor

from ...data.batches import Batch
from ...models.base import Model
from ...models.decoder import Decoder
from ...transforms.extend import extend_context
from ..experiment import Curve, Experiment, Outcome, Plot, exceeds, reaches, stays_below
from ..lab import Cell, Lab, column
from ..learn import learn
from ..small import decoder
from ..text import ByteText, held_out

SHORT, FACTOR = 128, 4
LONG = SHORT * FACTOR
WAYS = {"raw": "raw", "linear": "PI", "ntk": "NTK-aware", "yarn": "YaRN"}
BINS = 16


def extended(model: Model, way: str) -> Model:
    """The model for LONG tokens; "raw" changes nothing but what it says of its context."""
    if way == "raw":
        return extend_context(model, "abf", FACTOR, theta=10_000.0)
    return extend_context(model, way, FACTOR)


@torch.inference_mode()
def nats(model: Model, batch: Batch) -> Tensor:
    """-log p of every target, [B, T]."""
    assert isinstance(model, Decoder)
    return -model.eval().logprobs(model.hidden(batch.tokens), batch.targets)


def far(by_position: Tensor) -> float:
    """The mean over the last SHORT targets, [B, LONG] -> nats: a window slides over a text, and of each place only the
    end counts (2306.15595, sec. 3.2)."""
    return by_position[:, -SHORT:].mean().item()


def in_windows(model: Model, batch: Batch) -> float:
    """Of the same targets, each predicted from the SHORT / 2 to SHORT bytes before it: what the model can do with text
    of any length without a longer context."""
    half, total = SHORT // 2, 0.0
    starts = range(LONG - SHORT - half, LONG - half, half)
    for start in starts:
        part = slice(start, start + SHORT)
        rows = Batch(batch.tokens[:, part], batch.targets[:, part], batch.positions[:, :SHORT], batch.segments[:, part])
        total += nats(model, rows)[:, half:].mean().item()
    return total / len(starts)


def extend(steps: int, tuning: int, rows: int, seed: int) -> Cell:
    """Train on short texts, read long ones in every way, tune on long ones."""
    base = decoder(dim=96, layers=3, context=SHORT, seed=seed)
    learn(base, ByteText(16, SHORT, seed), steps=steps, lr=3e-3, seed=seed)
    text = held_out(rows, LONG)
    found: Cell = {"short": nats(base, text)[:, :SHORT].mean().item(), "windows": in_windows(base, text)}
    for way in WAYS:
        model = extended(base, way)
        by_position = nats(model, text)
        found[way] = far(by_position)
        found[f"{way} curve"] = by_position.view(rows, BINS, -1).mean((0, 2)).tolist()
        learn(model, ByteText(16 // FACTOR, LONG, seed + 1000), steps=tuning, lr=1e-3, seed=seed)
        by_position = nats(model, text)
        found[f"{way} tuned"] = far(by_position)
        found[f"{way} tuned curve"] = by_position.view(rows, BINS, -1).mean((0, 2)).tolist()
    learn(base, ByteText(16, SHORT, seed + 1000), steps=tuning, lr=1e-3, seed=seed)
    return {**found, "windows tuned": in_windows(base, text)}


def run(lab: Lab) -> Outcome:
    steps, tuning = (3000, 1000) if lab.full else (600, 300)
    rows = 4 if lab.quick else 96
    cells = lab.grid(extend, [{"steps": steps, "tuning": tuning, "rows": rows, "seed": s} for s in lab.seeds])
    loss = {name: column(cells, name) for name in ("short", "windows", "windows tuned")}
    loss |= {name: column(cells, name) for way in WAYS for name in (way, f"{way} tuned")}
    findings = [
        exceeds(
            f"without tuning, {worse} is worse than {better}", source,
            f"nats per byte after {LONG - SHORT} bytes with {worse} and {better}", loss[a], loss[b],
        )
        for a, worse, b, better, source in (
            ("raw", "no interpolation", "linear", "PI", "2306.15595, table 1"),
            ("linear", "PI", "ntk", "NTK-aware", "2309.00071, sec. 3.1"),
            ("ntk", "NTK-aware", "yarn", "YaRN", "2309.00071, sec. 4"),
        )
    ]  # fmt: skip
    for way in ("linear", "ntk", "yarn"):
        closed = [
            (before - after) / (before - goal)
            for before, after, goal in zip(loss[way], loss[f"{way} tuned"], loss["windows tuned"], strict=True)
        ]
        findings.append(
            reaches(
                f"a short tuning closes the gap that {WAYS[way]} leaves", "2306.15595, sec. 3.2; 2309.00071, sec. 4.1",
                f"share of the gap to the short-context model in windows, closed after {tuning} updates:", closed, 0.9,
            )
        )  # fmt: skip
    findings += [
        exceeds(
            "what hurts are the positions, not the text: in windows of the trained length the same bytes are easy",
            "ours", "nats per byte read raw and in windows", loss["raw"], loss["windows"], control=True,
        ),
        stays_below(
            "and within the trained length the model has learned", "ours",
            f"nats per byte of the first {SHORT} bytes", loss["short"], 2.5, control=True,
        ),
    ]  # fmt: skip
    table = [
        {
            "way": name,
            f"nats after {LONG - SHORT} bytes": sum(loss[way]) / len(cells),
            f"after {tuning} updates": sum(loss[f"{way} tuned"]) / len(cells),
        }
        for way, name in (("windows", "short context, in windows"), *WAYS.items())
    ]
    middle = [(i + 0.5) * LONG / BINS for i in range(BINS)]
    curves = [Curve(name, middle, [cell[f"{way} curve"] for cell in cells]) for way, name in WAYS.items()]
    curves.append(Curve("YaRN, tuned", middle, [cell["yarn tuned curve"] for cell in cells]))
    plot = Plot(f"Trained on {SHORT} bytes, read to {LONG}", "position", "nats per byte", curves)
    note = (
        f"{steps} updates of 2,048 bytes in rows of {SHORT}, then {tuning} in rows of {LONG} (in windows: of {SHORT}). "
        "A model this small also learns far positions without interpolation; see raw after tuning."
    )
    return Outcome(findings, table, plot, note)


EXPERIMENT = Experiment("E6", "yarn", "Stretched positions reach further, and a short tuning closes the gap", run, 5)

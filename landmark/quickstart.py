"""The main job in one call: real text in, a trained model out, in the ecosystem's format, measured and shown."""

from __future__ import annotations

import gzip
import json
import lzma
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .data.corpora import Corpus
from .data.shards import Shards
from .infer.generate import generate
from .infer.sampling import Sampling
from .models.base import Model
from .models.decoder import Decoder
from .train.config import Checkpoints, Evaluation
from .train.loop import Callback
from .train.optim import Muon
from .train.prepare import Prepared
from .train.recipe import SMALL, DataConfig, TrainConfig
from .train.run import train
from .train.schedule import WSD
from .weights.files import beside, write_json
from .weights.tokenizer import Tokenizer

PROMPTS = ('The "with" statement is used to', 'def read_lines(path):\n    """', "class Queue:\n")


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of the held-out text without a model: two compressors, and the training text's token counts."""

    gzip: float
    xz: float
    unigram: float


@dataclass(frozen=True)
class Report:
    model: str
    parameters: int
    steps: int
    minutes: float
    tokens_per_second: float
    bits_per_byte: float
    bits_per_byte_before: float
    baselines: Baselines
    before: list[str]
    after: list[str]


def recipe(out: str | Path, steps: int, corpus: str | tuple[str, ...] = "embedded", seed: int = 0) -> TrainConfig:
    """A Llama of about 5 M parameters and a byte-level BPE tokenizer of 4,096 tokens, trained with Muon."""
    return TrainConfig(
        out=str(out),
        model=SMALL,
        data=DataConfig(corpus=corpus, held_out=0.03, rows=16, length=256),
        steps=steps,
        dtype="bfloat16",
        optimizer=Muon.Config(lr=8e-3),
        schedule=WSD(warmup=min(20, steps // 4), decay=0.4),
        seed=seed,
        evaluation=Evaluation(every=max(1, steps // 4), batches=1000),
        checkpoints=Checkpoints(every=max(1, steps // 4), keep=1),
    )


def run(config: TrainConfig, *, callbacks: Sequence[Callback] = (), resume: bool = False) -> Report:
    """Train, measure and plot; `config.out` becomes a model directory, with loss.png and report.json besides.

    Raises what `train` raises.
    """
    out, began = Path(config.out).expanduser(), time.perf_counter()
    trained = train(config, callbacks=callbacks, sample=sample, resume=resume)
    text = Prepared(config, out).parts["held-out-0"][0]
    assert isinstance(text, Corpus)
    shards = out / "prepared"
    baselines = measure_baselines(Shards(shards / "train-0"), Shards(shards / "held-out-0"), text)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held, updates = ([r for r in records if key in r] for key in ("held_out", "tokens_per_s"))
    report = Report(
        model=str(out),
        parameters=sum(p.numel() for p in trained.model.parameters()),
        steps=config.steps,
        minutes=(time.perf_counter() - began) / 60,
        tokens_per_second=float(np.median([r["tokens_per_s"] for r in updates])),
        bits_per_byte=held[-1]["held_out"]["bits_per_byte"],
        bits_per_byte_before=held[0]["held_out"]["bits_per_byte"],
        baselines=baselines,
        before=held[0]["samples"],
        after=held[-1]["samples"],
    )
    plot(updates, held, baselines, out / "loss.png")
    write_json(out / "report.json", asdict(report))
    return report


def sample(model: Model, tokenizer: Tokenizer) -> list[str]:
    """What the model makes of the prompts, always with the same seed."""
    assert isinstance(model, Decoder)
    sampling = Sampling(temperature=0.7, top_p=0.95, max_tokens=60, seed=0)
    prompts = [tokenizer.encode(prompt, special=True) for prompt in PROMPTS]
    answers = generate(model, prompts, sampling, tokenizer=tokenizer)
    return [prompt + (answer.text or "") for prompt, answer in zip(PROMPTS, answers, strict=True)]


def measure_baselines(train: Shards, held: Shards, held_text: Corpus) -> Baselines:
    """Compressors see the held-out text as one file; the unigram model counts the training text's tokens, plus one."""
    text = "".join(document.text for document in held_text).encode()
    counts = np.ones(train.meta["vocab_size"])
    for document in range(len(train)):
        counts += np.bincount(train[document], minlength=len(counts))
    bits = -np.log2(counts / counts.sum())
    total = sum(float(bits[held[document]].sum()) for document in range(len(held)))
    return Baselines(
        gzip=8 * len(gzip.compress(text, 9)) / len(text),
        xz=8 * len(lzma.compress(text, preset=9)) / len(text),
        unigram=total / len(text),
    )


def plot(updates: list[dict[str, Any]], held: list[dict[str, Any]], baselines: Baselines, path: Path) -> None:
    """Bits per byte over the updates, training and held out, with the baselines as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["step"] for r in updates], [r["bits_per_byte"] for r in updates], lw=0.8, alpha=0.6, label="training")
    axes.plot(
        [r["step"] for r in held], [r["held_out"]["bits_per_byte"] for r in held], "o-", color="C3", label="held out"
    )
    for style, (name, value) in zip((":", "--", "-."), asdict(baselines).items(), strict=True):
        axes.axhline(value, color="0.4", ls=style, lw=1, label=f"{name} {value:.2f}")
    last = held[-1]["held_out"]["bits_per_byte"]
    axes.annotate(f"{last:.2f}", (held[-1]["step"], last), textcoords="offset points", xytext=(-8, -14), color="C3")
    low = min(last, *asdict(baselines).values())
    axes.set(xlabel="update", ylabel="bits per byte", ylim=(0.8 * low, 1.15 * max(asdict(baselines).values())))
    axes.set_title("landmark quickstart: a small Llama on Python's own documentation and library", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    with beside(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)

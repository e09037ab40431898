"""The main job in one call: real text in, a trained model out, in the ecosystem's format, measured and shown."""

from __future__ import annotations

import gzip
import json
import lzma
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .data.batches import Batches
from .data.corpora import Corpus, Embedded
from .data.shards import Shards, write_shards
from .infer.generate import generate
from .infer.sampling import Sampling
from .models.base import Model
from .models.decoder import Decoder
from .objectives.lm import CausalLM
from .train.config import Checkpoints, Evaluation, Settings
from .train.loop import Callback, fit
from .train.optim import Muon
from .train.schedule import WSD
from .weights.checkpoint import build, load
from .weights.files import beside, write_json
from .weights.tokenizer import Tokenizer
from .weights.tokenizer_train import train_tokenizer

VOCAB, CONTEXT, ROWS = 4096, 256, 16
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
PROMPTS = ('The "with" statement is used to', 'def read_lines(path):\n    """', "class Queue:\n")


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of the held-out text without a model: two compressors, and the training text's token frequencies."""

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


def run(
    out: str | Path,
    *,
    steps: int = 600,
    corpus: Corpus | None = None,
    callbacks: Sequence[Callback] = (),
    say: Callable[[str], None] = print,
    resume: bool = True,
    seed: int = 0,
) -> Report:
    """Tokenizer, data, training, measurement and plot under `out`; the model directory is `out` itself.

    A run that was stopped goes on where it was. Raises ValueError for a corpus that is too small.
    """
    out, began = Path(out), time.perf_counter()
    train_text, held_text = (corpus or Embedded()).split()
    tokenizer = tokenizer_for(train_text, out, say)
    train, held = (
        write_shards(text, tokenizer, out / "data" / name, progress=False, overwrite=True)
        for name, text in (("train", train_text), ("held-out", held_text))
    )
    say(f"{train.tokens:,} tokens of training text, {held.tokens:,} held out")
    baselines = measure_baselines(train, held, held_text)
    model = build(MODEL | {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id})
    parameters = sum(p.numel() for p in model.parameters())
    say(f"a Llama of {parameters / 1e6:.1f} M parameters: {steps} updates of {ROWS * CONTEXT:,} tokens")
    samples = sampler(tokenizer)
    settings = Settings(
        steps=steps,
        optimizer=Muon.Config(),
        schedule=WSD(warmup=min(20, steps // 4), decay=0.4),
        seed=seed,
        evaluation=Evaluation(every=max(1, steps // 6), batches=8),
        checkpoints=Checkpoints(every=max(1, steps // 4), keep=1),
    )
    held_out = Batches(held, ROWS, CONTEXT, shuffle=False, epochs=1)
    batches = Batches(train, ROWS, CONTEXT, seed=seed)
    fit(
        model, CausalLM(), batches, settings, out=out, held_out=list(held_out), sample=samples, callbacks=callbacks,
        resume=resume,
    )  # fmt: skip
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held_records = [r for r in records if "held_out" in r]
    updates = [r for r in records if "tokens_per_s" in r]
    report = Report(
        model=str(out),
        parameters=parameters,
        steps=steps,
        minutes=(time.perf_counter() - began) / 60,
        tokens_per_second=float(np.median([r["tokens_per_s"] for r in updates])),
        bits_per_byte=held_records[-1]["held_out"]["bits_per_byte"],
        bits_per_byte_before=held_records[0]["held_out"]["bits_per_byte"],
        baselines=baselines,
        before=held_records[0]["samples"],
        after=held_records[-1]["samples"],
    )
    plot(updates, held_records, baselines, out / "loss.png")
    write_json(out / "report.json", asdict(report))
    assert isinstance(load(out), Decoder)
    return report


def tokenizer_for(text: Corpus, directory: Path, say: Callable[[str], None]) -> Tokenizer:
    """Trained once; a later run with the same directory reads it."""
    if (directory / "tokenizer.json").exists():
        return Tokenizer.load(directory)
    say(f"training a byte-level BPE tokenizer of {VOCAB} tokens")
    tokenizer = train_tokenizer("bpe", text.texts(), VOCAB)
    tokenizer.save(directory)
    return tokenizer


def sampler(tokenizer: Tokenizer) -> Callable[[Model], list[str]]:
    """What the model makes of the prompts, always with the same seed."""
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    sampling = Sampling(temperature=0.7, top_p=0.95, max_tokens=60, seed=0)

    def sample(model: Model) -> list[str]:
        assert isinstance(model, Decoder)
        answers = generate(model, prompts, sampling, tokenizer=tokenizer)
        return [prompt + (answer.text or "") for prompt, answer in zip(PROMPTS, answers, strict=True)]

    return sample


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

"""Attention is all you need (Vaswani et al. 2017): the encoder-decoder in small, on a translation in small."""

from __future__ import annotations

import torch

from ...config import Config
from ...data.synthetic import Rewriting, Synthetic
from ...infer.beam import Beams, beam_search
from ...models.encoder_decoder import EncoderDecoder
from ...models.inspect import count
from ...nn.position import LearnedPositions, SinusoidalPositions
from ...objectives.seq2seq import Seq2Seq
from ...train.optim import AdamW
from ...train.schedule import InverseSqrt
from ...transforms.rebuild import replace_configs
from ...weights.checkpoint import build
from ..experiment import Experiment, Outcome, alike, exceeds, reaches, stays_below
from ..lab import Cell, Lab, column
from ..learn import learn

TASK = Rewriting(symbols=16, doubled=8, shortest=5, longest=10)
BEAMS = Beams(width=4, length_penalty=0.6, stop_ids=(TASK.END,), max_tokens=2 * TASK.longest + 1)


def transformer(heads: int, learned: bool, seed: int, dim: int = 64) -> EncoderDecoder:
    """Two post-norm layers a side, one embedding for source, target and output."""
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("attention_heads", heads), ("ffn_dim", 2 * dim), ("layers", 2))
    }
    said = {
        "model_type": "marian", "architectures": ["MarianMTModel"], "is_encoder_decoder": True, "d_model": dim, **sides,
        "activation_function": "relu", "dropout": 0.0, "vocab_size": TASK.vocab, "max_position_embeddings": 64,
        "scale_embedding": True, "share_encoder_decoder_embeddings": True, "tie_word_embeddings": True,
        "eos_token_id": TASK.END, "pad_token_id": TASK.START, "decoder_start_token_id": TASK.START,
    }  # fmt: skip

    def table(config: Config) -> Config:
        return LearnedPositions.Config(size=64) if isinstance(config, SinusoidalPositions.Config) else config

    with torch.device("meta"):
        config = build(said).cfg
    torch.manual_seed(seed)
    model = (replace_configs(config, table) if learned else config).build()
    assert isinstance(model, EncoderDecoder)
    return model


def translate(variant: str, steps: int, held_out: int, seed: int) -> Cell:
    """Train, then write held-out targets by beam search: the share that is right to the last token."""
    heads, learned, astray = {
        "4 heads": (4, False, False),
        "1 head": (1, False, False),
        "learned positions": (4, True, False),
        "other sources": (4, False, True),
    }[variant]
    model = transformer(heads, learned, seed)
    task = Rewriting(**{**vars(TASK), "astray": astray})
    learn(
        model, Synthetic(task, 64, seed), steps=steps, seed=seed, objective=Seq2Seq(label_smoothing=0.1),
        optimizer=AdamW.Config(lr=5e-3, betas=(0.9, 0.98), eps=1e-9), schedule=InverseSqrt(warmup=100), average=0.2,
    )  # fmt: skip
    pairs = TASK.pairs(held_out, -1 - seed)
    answers = beam_search(model, [source for source, _ in pairs], BEAMS)
    right = sum(answer[0].tokens == [*target, TASK.END] for answer, (_, target) in zip(answers, pairs, strict=True))
    return {"exact": right / len(pairs), "parameters": count(model)}


def run(lab: Lab) -> Outcome:
    steps = 3000 if lab.full else 1000
    variants = ["4 heads", "1 head", "learned positions", "other sources"]
    held_out = 8 if lab.quick else 400
    cases = [{"variant": v, "steps": steps, "held_out": held_out, "seed": s} for s in lab.seeds for v in variants]
    cells = lab.grid(translate, cases)
    exact = {v: column(cells, "exact", variant=v) for v in variants}
    findings = [
        reaches(
            "attention alone, without recurrence, learns sequence transduction", "sec. 1 and 6.1",
            "held-out sentences right to the last token", exact["4 heads"], 0.99,
        ),
        exceeds(
            "several heads beat one at equal width", "sec. 6.2, table 3 (A)", "exact with 4 heads and 1",
            exact["4 heads"], exact["1 head"],
        ),
        alike(
            "sinusoidal and learned positions are about as good", "sec. 3.5, table 3 (E)",
            "exact with sinusoidal and learned positions", exact["4 heads"], exact["learned positions"], 0.01,
        ),
        stays_below(
            "without its source a target cannot be guessed", "ours", "exact when trained on other pairs' sources",
            exact["other sources"], 0.01, control=True,
        ),
    ]  # fmt: skip
    table = [
        {"variant": v, "exact": sum(x) / len(x), "parameters": column(cells, "parameters", variant=v)[0]}
        for v, x in exact.items()
    ]
    return Outcome(
        findings,
        table,
        note=f"Sentences of {TASK.shortest} to {TASK.longest} symbols are said backwards, half of the symbols twice. "
        f"{steps} updates of 64 pairs; label smoothing 0.1, inverse-sqrt schedule, weights averaged over the last "
        f"fifth (sec. 6.1), beam 4 with length penalty 0.6; {held_out} held-out sentences a seed.",
    )


EXPERIMENT = Experiment("F1", "transformer", "Attention alone learns sequence transduction", run, minutes=5)

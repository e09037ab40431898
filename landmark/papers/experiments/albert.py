"""ALBERT (Lan et al. 2019): what sharing saves, and why to ask for the order of sentences."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...config import Config
from ...data.corpora import open_corpus
from ...data.labelled import Example, LabelledBatches, collate, sentence_pairs, sentences
from ...models.encoder import Encoder
from ...models.inspect import count
from ...nn.embedding import Embedding
from ...nn.heads import SequenceHead
from ...objectives.classification import SequenceClassification, inputs
from ...transforms.rebuild import replace_configs
from ...weights.checkpoint import build, describe
from ...weights.tokenizer_train import train_tokenizer
from ..experiment import Experiment, Outcome, equal, exceeds, reaches, stays_below
from ..lab import Cell, Lab, column
from ..learn import learn

PRINTED = {  # millions, table 1
    "bert-base-uncased": 108, "bert-large-uncased": 334,
    "albert-base-v2": 12, "albert-large-v2": 18, "albert-xlarge-v2": 60, "albert-xxlarge-v2": 235,
}  # fmt: skip
QUESTIONS = {"next": "NSP", "swap": "SOP"}
VOCAB, LENGTH, HELD_OUT = 4096, 64, 0.1


def parameters(size: str, **changes: Any) -> int:
    """What the paper counts of a published size: the body and the pooler, without the heads of pre-training."""
    hf = {**describe(size)[1], **changes}
    with torch.device("meta"):
        model = build(hf)
    assert isinstance(model, Encoder)
    pair = model.head("pair")
    assert isinstance(pair, SequenceHead) and pair.linear is not None
    return count(model) - count(model.head("mlm")) - count(pair.linear)


@cache
def text() -> tuple[list[list[list[int]]], list[list[list[int]]], int, int]:
    """The embedded corpus' documents as sentences of word pieces, to train on and held out; the ids of [CLS], [SEP]."""
    parts = open_corpus("embedded").split(HELD_OUT)
    train, held_out = ([sentences(document.text[:6_000]) for document in part] for part in parts)
    tokenizer = train_tokenizer("wordpiece", (sentence for document in train for sentence in document), VOCAB)
    ids = [[tokenizer.encode_batch(document) for document in part] for part in (train, held_out)]
    assert tokenizer.cls_id is not None and tokenizer.sep_id is not None
    return ids[0], ids[1], tokenizer.cls_id, tokenizer.sep_id


def pairs(question: str, *, held_out: bool, seed: int, epoch: int = 0) -> list[Example]:
    train, held, cls, sep = text()
    order: Any = question
    return sentence_pairs(held if held_out else train, LENGTH, cls=cls, sep=sep, order=order, seed=seed, epoch=epoch)


def albert(positions: bool, seed: int) -> Encoder:
    """Three passes of one shared layer. Without positions it sees two bags of words."""
    said = {
        "model_type": "albert", "architectures": ["AlbertForPreTraining"], "vocab_size": VOCAB, "embedding_size": 64,
        "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512,
        "max_position_embeddings": LENGTH, "hidden_act": "gelu_new", "classifier_dropout_prob": 0.0,
    }  # fmt: skip

    def bag(config: Config) -> Config:
        return replace(config, positions=None) if isinstance(config, Embedding.Config) else config

    with torch.device("meta"):
        config = build(said).cfg
    torch.manual_seed(seed)
    model = (config if positions else replace_configs(config, bag)).build()
    assert isinstance(model, Encoder)
    return model


@torch.inference_mode()
def accuracy(model: Encoder, question: str, most: int) -> float:
    """On held-out pairs, weighing both answers alike."""
    examples = pairs(question, held_out=True, seed=0)[:most]
    right: dict[int, list[Tensor]] = {0: [], 1: []}
    for start in range(0, len(examples), 256):
        batch = collate(examples[start : start + 256], width=LENGTH)
        assert batch.labels is not None
        found = model.eval()(**inputs(batch), head="pair").argmax(-1) == batch.labels
        for label, hits in right.items():
            hits.append(found[batch.labels == label])
    return sum(torch.cat(hits).double().mean().item() for hits in right.values()) / 2


def tell(question: str, positions: bool, steps: int, most: int, seed: int) -> Cell:
    """Train on one question, ask both; with no steps, a model that has learned nothing."""
    model = albert(positions, seed)
    if steps:
        examples = LabelledBatches(
            lambda epoch: pairs(question, held_out=False, seed=seed, epoch=epoch + 1), 32, width=LENGTH, seed=seed
        )
        learn(model, examples, steps=steps, lr=1e-3, seed=seed, objective=SequenceClassification(head="pair"))
    return {f"accuracy on {other}": accuracy(model, other, most) for other in QUESTIONS}


def run(lab: Lab) -> Outcome:
    steps, most = 4000 if lab.full else 600, 64 if lab.quick else 1500
    how = [
        ("next", True, steps),
        ("swap", True, steps),
        ("next", False, steps),
        ("swap", False, steps),
        ("next", True, 0),
    ]
    names = ("question", "positions", "steps")
    cells = lab.grid(
        tell, [{**dict(zip(names, each, strict=True)), "most": most, "seed": s} for s in lab.seeds for each in how]
    )

    def told(trained: str, asked: str, positions: bool = True, steps: int = steps) -> list[float]:
        return column(cells, f"accuracy on {asked}", question=trained, positions=positions, steps=steps)

    ours = {size: parameters(size) for size in PRINTED}
    ratio = ours["bert-large-uncased"] / ours["albert-large-v2"]
    half = [0.5] * len(lab.seeds)
    findings = [
        *(
            equal(
                f"{size.removesuffix('-v2')} has {PRINTED[size]} million parameters", "table 1", f"{ours[size]:,}",
                abs(ours[size] / 1e6 - PRINTED[size]) / PRINTED[size], 0.5 / PRINTED[size],
            )
            for size in ("albert-base-v2", "albert-large-v2")
        ),
        reaches(
            "ALBERT-large has 18 times fewer parameters than BERT-large", "sec. 1, table 1",
            f"{ours['bert-large-uncased']:,} against {ours['albert-large-v2']:,}: a ratio of", [ratio], 18,
        ),
        equal(
            "shared layers cost nothing however many they are", "sec. 3.1", "ALBERT-large with 12 and with 24 layers",
            abs(parameters("albert-large-v2", num_hidden_layers=12) / ours["albert-large-v2"] - 1), 0.0,
        ),
        exceeds(
            "two bags of words tell NSP, which is a question of topic, better than SOP", "sec. 3.1",
            "accuracy without positions on NSP and SOP", told("next", "next", False), told("swap", "swap", False),
        ),
        exceeds(
            "SOP needs the order of words", "sec. 3.1", "accuracy on SOP with and without positions",
            told("swap", "swap"), told("swap", "swap", False),
        ),
        stays_below(
            "what is learned from NSP does not solve SOP", "sec. 4.6, table 5", "accuracy on SOP, trained on NSP",
            told("next", "swap"), 0.55,
        ),
        exceeds(
            "what is learned from SOP helps with NSP", "sec. 4.6, table 5",
            "accuracy on NSP, trained on SOP, and by chance", told("swap", "next"), half,
        ),
        exceeds(
            "SOP can be learned where it is trained", "sec. 4.6, table 5",
            "accuracy on SOP, trained on it, and by chance", told("swap", "swap"), half,
        ),
        reaches(
            "the model learns NSP at all", "ours", "accuracy on NSP, trained on it", told("next", "next"), 0.6,
            control=True,
        ),
        stays_below(
            "a model that has learned nothing guesses", "ours", "accuracy on NSP and SOP, untrained",
            [x for asked in QUESTIONS for x in told("next", asked, steps=0)], 0.55, control=True,
        ),
    ]  # fmt: skip
    table = [
        {
            "trained on": QUESTIONS[trained],
            "positions": "yes" if positions else "no",
            **{name: sum(x := told(trained, asked, positions)) / len(x) for asked, name in QUESTIONS.items()},
        }
        for trained, positions, n in how
        if n
    ]
    counted = ", ".join(f"{size} {ours[size] / 1e6:.1f}M (printed {PRINTED[size]}M)" for size in PRINTED)
    note = f"{steps} updates of 32 pairs of {LENGTH} word pieces. Body and pooler: {counted}."
    return Outcome(findings, table, note=note)


EXPERIMENT = Experiment("F4", "albert", "Few parameters, and sentence order as the harder question", run, minutes=4)

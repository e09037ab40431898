"""GPT-1 (Radford et al. 2018): a model that has read much needs few labels."""

from __future__ import annotations

import copy
import io
import tokenize
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ...data.batches import IGNORE
from ...data.corpora import open_corpus
from ...data.labelled import Example, LabelledBatches, collate
from ...models.decoder import Decoder
from ...models.encoder import Encoder, with_heads
from ...nn.heads import LastToken, SequenceHead
from ...objectives.classification import GenerativeFineTuning, inputs
from ..experiment import Experiment, Outcome, exceeds
from ..lab import Cell, Lab, column
from ..learn import learn
from ..small import decoder
from ..text import ByteText

KINDS = ("code", "comment", "string", "docstring")
LENGTH, FEW, MANY = 128, 8, 128
RATES = (5e-4, 2e-3)  # the better one on the development set, for every variant by itself
PARTS = ("train", "dev", "test")


def kinds(source: str) -> np.ndarray | None:
    """What each character of a Python file is part of: an index of KINDS; None for a file that cannot be read so."""
    lines = source.splitlines(keepends=True)
    starts = np.cumsum([0, *map(len, lines)])
    found = np.zeros(len(source), dtype=np.int64)
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                (row, column), (end_row, end_column) = token.start, token.end
                quoted = 3 if token.string.endswith(('"""', "'''")) else 2
                kind = 1 if token.type == tokenize.COMMENT else quoted
                found[starts[row - 1] + column : starts[end_row - 1] + end_column] = kind
    except (tokenize.TokenError, SyntaxError):
        return None
    return found


@cache
def text() -> tuple[Tensor, dict[str, list[tuple[bytes, np.ndarray]]]]:
    """What is read without labels, as bytes, and the labelled files, each with what its bytes are part of: to train on,
    to choose by, to test on. No labelled file is read before."""
    parts: dict[str, list[tuple[bytes, np.ndarray]]] = {part: [] for part in PARTS}
    rest, chosen = [], 0
    for number, document in enumerate(open_corpus("embedded")):
        labelled = number % 4 == 0 and document.name.endswith(".py") and document.text.isascii()
        found = kinds(document.text) if labelled else None
        if found is None or len(found) <= LENGTH:
            rest.append(document.text.encode())
        else:
            parts[PARTS[chosen % 3]].append((document.text.encode(), found))
            chosen += 1
    return torch.from_numpy(np.frombuffer(b"\0".join(rest), dtype=np.uint8).copy()), parts


def examples(part: str, each: int, seed: int) -> list[Example]:
    """Passages, `each` for every kind: what is the last byte part of?"""
    rng, found = np.random.default_rng([seed, PARTS.index(part)]), []
    files = text()[1][part]
    for label in range(len(KINDS)):
        places = [np.flatnonzero(kind[LENGTH:] == label) + LENGTH for _, kind in files]
        holding = [number for number, at in enumerate(places) if len(at)]
        for number in rng.choice(holding, each):
            end = int(rng.choice(places[number])) + 1
            tokens = list(files[number][0][end - LENGTH : end])
            found.append(Example(tokens, label=label, targets=[*tokens[1:], IGNORE]))
    return found


def start(reading: str, steps: int, seed: int) -> Decoder:
    """A model that has read the text without labels, or its bytes in random order, or nothing."""
    model = decoder(dim=96, layers=3, tied=True, seed=seed)
    if reading != "nothing":
        unlabelled = text()[0]
        if reading == "shuffled":
            unlabelled = unlabelled[torch.randperm(len(unlabelled), generator=torch.Generator().manual_seed(seed))]
        learn(model, ByteText(16, LENGTH, seed, text=unlabelled), steps=steps, lr=3e-3, seed=seed)
    return model


def tuned(model: Decoder, labels: int, weight: float, each: int, seed: int) -> float:
    """Accuracy on the test set after fine-tuning with so many labels a class."""
    found = []
    for rate in RATES:
        classes = SequenceHead.Config(labels=KINDS, pool=LastToken())
        torch.manual_seed(seed)
        new = with_heads(copy.deepcopy(model), {"classify": classes, "lm": model.cfg.head})
        batches = LabelledBatches(examples("train", labels, seed), 16, width=LENGTH, seed=seed)
        steps = 100 if labels == FEW else 200
        learn(new, batches, steps=steps, lr=rate, seed=seed, objective=GenerativeFineTuning(weight=weight))
        found.append((accuracy(new, "dev", each, seed), accuracy(new, "test", each, seed)))
    return max(found)[1]


@torch.inference_mode()
def accuracy(model: Encoder, part: str, each: int, seed: int) -> float:
    batch = collate(examples(part, each, 10_000 + seed))
    assert batch.labels is not None
    return (model.eval()(**inputs(batch), head="classify").argmax(-1) == batch.labels).double().mean().item()


def transfer(reading: str, steps: int, each: int, seed: int) -> Cell:
    """Read, then fine-tune with few and with many labels, with and without the auxiliary objective."""
    model = start(reading, steps, seed)
    found = {"few": tuned(model, FEW, 0.5, each, seed)}
    if reading != "shuffled":
        found["many"] = tuned(model, MANY, 0.5, each, seed)
    if reading == "text":
        found |= {
            "few, no aux": tuned(model, FEW, 0.0, each, seed),
            "many, no aux": tuned(model, MANY, 0.0, each, seed),
        }
    return found


def run(lab: Lab) -> Outcome:
    steps, each = 4000 if lab.full else 600, 4 if lab.quick else 128
    readings = ["text", "nothing", "shuffled"]
    cases = [{"reading": r, "steps": steps, "each": each, "seed": s} for s in lab.seeds for r in readings]
    cells = lab.grid(transfer, cases)
    few = {r: column(cells, "few", reading=r) for r in readings}
    own = {name: column(cells, name, reading="text") for name in ("few", "many", "few, no aux", "many, no aux")}
    scratch = column(cells, "many", reading="nothing")
    findings = [
        exceeds(
            f"pre-training on text without labels beats none, with {FEW} labels a class", "sec. 5, table 5",
            "accuracy with and without", few["text"], few["nothing"],
        ),
        exceeds(
            f"and with {MANY}", "sec. 5, table 5", "accuracy with and without", own["many"], scratch,
        ),
        exceeds(
            "few labels need the pre-training more than many do", "sec. 1", "what it adds to accuracy, few and many",
            [a - b for a, b in zip(few["text"], few["nothing"], strict=True)],
            [a - b for a, b in zip(own["many"], scratch, strict=True)],
        ),
        exceeds(
            "the auxiliary objective helps where there are more labels", "sec. 5, table 5",
            f"accuracy with and without, {MANY} labels a class", own["many"], own["many, no aux"],
        ),
        exceeds(
            "it is the text that helps: reading the same bytes in random order does less", "ours",
            "accuracy after text and after shuffled bytes", few["text"], few["shuffled"], control=True,
        ),
    ]  # fmt: skip
    table = [
        {"read before": r, "labels a class": n, "auxiliary": aux, "accuracy": sum(values) / len(values)}
        for r, n, aux, values in [
            ("text", FEW, "yes", own["few"]), ("text", FEW, "no", own["few, no aux"]),
            ("nothing", FEW, "yes", few["nothing"]), ("shuffled bytes", FEW, "yes", few["shuffled"]),
            ("text", MANY, "yes", own["many"]), ("text", MANY, "no", own["many, no aux"]),
            ("nothing", MANY, "yes", scratch),
        ]
    ]  # fmt: skip
    note = (
        f"Does a passage of {LENGTH} bytes of Python end in {', '.join(KINDS[:-1])} or {KINDS[-1]} (chance 0.25)? "
        f"{steps} updates of 2,048 bytes of other files; {len(KINDS) * each} test passages from files of their own; of "
        f"the learning rates {', '.join(f'{r:g}' for r in RATES)} the better one on a development set."
    )
    return Outcome(findings, table, note=note)


EXPERIMENT = Experiment("F6", "gpt1", "A model that has read much needs few labels", run, minutes=6)

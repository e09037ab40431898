"""Multi-token prediction (Gloeckle et al. 2024; DeepSeek-V3, 2024): drafts of the token after the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...data.batches import Batch
from ...models.decoder import Decoder
from ...nn.mtp import IndependentDrafts, SequentialDrafts
from ...objectives.mtp import MultiToken
from ..experiment import Experiment, Outcome, exceeds
from ..lab import Cell, Lab, column
from ..learn import learn, loss
from ..small import decoder
from ..text import VOCAB, ByteText, corpus, held_out

DIM, LAYERS, LENGTH = 64, 2, 64
KINDS: dict[str, type[SequentialDrafts.Config] | type[IndependentDrafts.Config]] = {
    "sequential": SequentialDrafts.Config,
    "independent": IndependentDrafts.Config,
}
ALLOWED = 0.02  # nats per byte that count as no harm


def train_variant(kind: str, steps: int, seed: int) -> Cell:
    """A small decoder over bytes, alone or jointly with one draft module; its acceptance on held-out text."""
    config = decoder(dim=DIM, layers=LAYERS).cfg
    batches, text = ByteText(16, LENGTH, seed), held_out(256, LENGTH)
    if kind == "none":
        model = decoder(dim=DIM, layers=LAYERS, seed=seed)
        learn(model, batches, steps=steps, lr=3e-3, seed=seed)
        return {"nats": loss(model, text)}
    layer, norm = config.layers[-1], config.norm
    assert isinstance(layer, Mapping) and norm is not None
    torch.manual_seed(seed)
    model = replace(config, drafts=KINDS[kind](depth=1, layer=layer, norm=norm)).build()
    before = accepted(model, text)["draft"]
    learn(model, batches, steps=steps, lr=3e-3, seed=seed, objective=MultiToken(weight=0.3))
    return {"nats": loss(model, text), **accepted(model, text), "untrained": before}


@torch.inference_mode()
def accepted(model: Decoder, batch: Batch) -> Cell:
    """Where the model's likeliest token after the next one is what was proposed for it without asking the model: by
    the draft, by the counts of pairs of bytes, by the commonest byte."""
    ctx = model.context(batch.tokens, segments=batch.segments, positions=batch.positions)
    hidden, drafted = model.hidden_and_drafts(batch.tokens, ctx)
    own = model.logits(hidden).argmax(-1)[:, 1:]
    pairs = counts()

    def share(proposed: Tensor) -> float:
        return (proposed == own).double().mean().item()

    return {
        "draft": share(model.logits(drafted[0]).argmax(-1)[:, :-1]),
        "bigram": share(pairs.argmax(-1)[batch.tokens[:, 1:]]),
        "unigram": share(pairs.sum(0).argmax()),
    }


def counts() -> Tensor:
    """[byte, next byte]: how often pairs occur in the text of training."""
    text = corpus().long()
    return torch.bincount(text[:-1] * VOCAB + text[1:], minlength=VOCAB * VOCAB).view(VOCAB, VOCAB)


def run(lab: Lab) -> Outcome:
    steps = 5000 if lab.full else 300
    kinds = ("none", *KINDS)
    cells = lab.grid(train_variant, [{"kind": k, "steps": steps, "seed": s} for s in lab.seeds for k in kinds])
    nats = {k: column(cells, "nats", kind=k) for k in kinds}
    share = {(k, name): column(cells, name, kind=k) for k in KINDS for name in ("draft", "bigram", "unigram")}
    source = {"sequential": "2412.19437, sec. 5.4.3", "independent": "2404.19737, sec. 3.2"}
    findings = [
        exceeds(
            f"a trained {kind} module drafts more of the model's own choices than {control} does", source[kind],
            f"share of the model's choices proposed by the module and by {control}",
            share[kind, "draft"], share[kind, name],
        )
        for kind in KINDS
        for name, control in (("bigram", "a bigram"), ("unigram", "the commonest byte"))
    ] + [
        exceeds(
            f"training it jointly does not hurt the next token by more than {ALLOWED:g} nats ({kind})",
            "2412.19437, table 4" if kind == "sequential" else "2404.19737, sec. 3.1",
            "nats per byte of the model alone and jointly", nats["none"], nats[kind], by=-ALLOWED,
        )
        for kind in KINDS
    ] + [
        exceeds(
            f"it is training that makes a {kind} module's drafts", "ours", "share, trained and untrained",
            share[kind, "draft"], column(cells, "untrained", kind=kind), control=True,
        )
        for kind in KINDS
    ]  # fmt: skip
    table = [
        {
            "drafts": k,
            "nats per byte": sum(nats[k]) / len(nats[k]),
            **{n: sum(share[k, n]) / len(share[k, n]) if k in KINDS else "-" for n in ("draft", "bigram", "unigram")},
        }
        for k in kinds
    ]
    note = f"{steps} updates of 1,024 bytes; all see the same batches, at the same learning rate; one draft a token."
    return Outcome(findings, table, note=note)


EXPERIMENT = Experiment("E16", "multi-token-prediction", "Drafts of the token after the next", run, minutes=3)

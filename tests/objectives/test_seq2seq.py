from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import landmark
from landmark.data.pairs import Seq2SeqBatch
from landmark.infer.beam import Beams, beam_search
from landmark.infer.generate import generate
from landmark.infer.sampling import Sampling
from landmark.models.encoder_decoder import EncoderDecoder
from landmark.objectives.seq2seq import Seq2Seq

EOS, START, DIGIT = 0, 1, 2  # digit d is the id DIGIT + d
TINY = dict(
    architectures=["MarianMTModel"], vocab_size=12, d_model=64, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, dropout=0.0,
    pad_token_id=START, decoder_start_token_id=START, eos_token_id=EOS, max_position_embeddings=64,
    scale_embedding=True, activation_function="relu",
)  # fmt: skip


def build(**changes: Any) -> EncoderDecoder:
    torch.manual_seed(0)
    model = landmark.build({**TINY, **changes})
    assert isinstance(model, EncoderDecoder)
    return model


def batch_of(pairs: list[tuple[list[int], list[int]]]) -> Seq2SeqBatch:
    """Padded pairs, a pair a row; targets end with EOS."""

    def rows(sequences: list[list[int]], fill: int) -> Tensor:
        return pad_sequence([torch.tensor(s) for s in sequences], batch_first=True, padding_value=fill)

    sources, targets = [s for s, _ in pairs], [[*t, EOS] for _, t in pairs]
    return Seq2SeqBatch(
        source=rows(sources, EOS),
        target_in=rows([[START, *t[:-1]] for t in targets], EOS),
        target_out=rows(targets, -100),
        source_segments=rows([[1] * len(s) for s in sources], 0),
        target_segments=rows([[1] * len(t) for t in targets], 0),
    )


def reversals(generator: random.Random, longest: int) -> tuple[list[int], list[int]]:
    source = [DIGIT + generator.randrange(10) for _ in range(generator.randint(1, longest))]
    return source, source[::-1]


PAIRS = [([5, 6, 7], [7, 6]), ([4, 3, 2, 9, 8, 5], [2]), ([11], [4, 4, 4, 4, 5])]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_equals_the_smoothed_divergence(smoothing: float) -> None:
    """KL(q, p) differs from the cross-entropy by q's entropy, which no model can change."""
    model, batch = build().double(), batch_of(PAIRS)
    objective = Seq2Seq(label_smoothing=smoothing)
    loss = objective.loss(model, batch)
    loss.sum.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(
        batch.source, batch.target_in, source_segments=batch.source_segments, target_segments=batch.target_segments
    )
    kept = batch.target_out >= 0
    q = F.one_hot(batch.target_out[kept], 12).double() * (1 - smoothing) + smoothing / 12
    divergence = F.kl_div(logits[kept].log_softmax(-1), q, reduction="sum")
    entropy = -torch.special.xlogy(q, q).sum()
    assert loss.count == objective.count(batch) == 11
    assert float(loss.sum.detach()) == pytest.approx(float((divergence + entropy).detach()), rel=1e-12)
    divergence.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and (ours[name] - p.grad).abs().max() < 1e-10, name
    nll = F.cross_entropy(logits[kept], batch.target_out[kept], reduction="sum")
    assert float(loss.metrics["nll"][0]) == pytest.approx(float(nll.detach()), rel=1e-12)


def test_splitting_a_batch_changes_nothing() -> None:
    model, objective = build().double(), Seq2Seq()
    whole = objective.loss(model, batch_of(PAIRS))
    parts = [objective.loss(model, batch_of([pair])) for pair in PAIRS]
    assert float(whole.sum.detach()) == pytest.approx(sum(float(part.sum.detach()) for part in parts), rel=1e-12)
    assert whole.count == sum(part.count for part in parts)


def test_rows_of_padding_alone_cost_nothing() -> None:
    """As the last batch of an epoch has them when it is split over processes."""
    model, batch = build().double(), batch_of(PAIRS)
    want = Seq2Seq().loss(model, batch)
    rows = {name: F.pad(getattr(batch, name), (0, 0, 0, 2)) for name in ("source", "target_in", "source_segments")}
    segments, out = F.pad(batch.target_segments, (0, 0, 0, 2)), F.pad(batch.target_out, (0, 0, 0, 2), value=-100)
    got = Seq2Seq().loss(model, Seq2SeqBatch(**rows, target_out=out, target_segments=segments))
    assert (float(got.sum.detach()), got.count) == (pytest.approx(float(want.sum.detach()), rel=1e-12), want.count)
    empty = Seq2SeqBatch(*(t[3:] for t in (*list(rows.values())[:2], out, rows["source_segments"], segments)))
    none = Seq2Seq().loss(model, empty)
    none.sum.backward()
    assert (float(none.sum.detach()), none.count) == (0.0, 0)


def test_learns_to_reverse() -> None:
    """Held-out strings of digits, by greedy and by beam search."""
    model, objective, generator = build(), Seq2Seq(), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    held_out = [reversals(generator, 8) for _ in range(100)]
    known = {tuple(source) for source, _ in held_out}

    def batches() -> Iterator[Seq2SeqBatch]:
        while True:
            pairs = [reversals(generator, 8) for _ in range(64)]
            yield batch_of([pair for pair in pairs if tuple(pair[0]) not in known])

    steps, began = 600, time.monotonic()
    for step, batch in zip(range(steps), batches(), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 60, (steps - step) / (steps - 60))
        objective.loss(model, batch).value.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{time.monotonic() - began:.0f} s")
    model.eval()
    sources, targets = [s for s, _ in held_out], [[*t, EOS] for _, t in held_out]
    greedy = generate(model, sources, Sampling(temperature=0, max_tokens=20))
    searched = beam_search(model, sources, Beams(width=4, max_tokens=20))
    exact = {
        "greedy": sum(a.tokens == t for a, t in zip(greedy, targets, strict=True)),
        "beam": sum(h[0].tokens == t for h, t in zip(searched, targets, strict=True)),
    }
    assert min(exact.values()) >= 95, exact

"""The one test that every encoder passes: against a tiny random reference, with all parameters perturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import landmark
from landmark.models.encoder import Encoder
from landmark.weights.checkpoint import describe

from .families import TOLERANCE, check_round_trip, close, reference

BASE = dict(
    vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=20,
    max_position_embeddings=40,
)  # fmt: skip
LENGTHS = (17, 11, 3)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (none that a reference takes for padding), types, and a mask of rows padded on the right, [3, 17]."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 61, (len(LENGTHS), LENGTHS[0]), generator=generator)
    types = torch.randint(0, 2, tokens.shape, generator=generator)
    mask = (torch.arange(LENGTHS[0]) < torch.tensor(LENGTHS)[:, None]).long()
    return tokens, types, mask


def expected(architecture: str, out: Any) -> dict[str | None, Tensor]:
    """What each of our heads (None: a plain call) is to say, from the reference's output."""
    if architecture.endswith("Model"):
        pooled = {"pooled": out.pooler_output} if "pooler_output" in out else {}
        return {None: out.last_hidden_state, **pooled}
    if architecture.endswith("ForPreTraining"):
        pair = out.sop_logits if "sop_logits" in out else out.seq_relationship_logits
        return {None: out.prediction_logits, "mlm": out.prediction_logits, "pair": pair}
    if architecture.endswith("ForQuestionAnswering"):
        return {None: torch.stack([out.start_logits, out.end_logits], -1)}
    if architecture.endswith("ForMultipleChoice"):
        return {None: out.logits.T}
    return {None: out.logits}


def check_encoder(config: Any, architecture: str, directory: Path, *, tolerance: float = TOLERANCE) -> Encoder:
    """Parity on full and padded rows, packed == alone, exact weight round trip."""
    theirs = reference(config, getattr(transformers, architecture), directory)
    model = landmark.load(directory)
    assert isinstance(model, Encoder)
    tokens, types, mask = batch()
    typed = config.type_vocab_size > 1
    with torch.no_grad():
        for padded in (False, True):
            rows: dict[str, Tensor] = {"attention_mask": mask} if padded else {}
            rows |= {"token_type_ids": types} if typed else {}
            inputs = {"input_ids": tokens, **rows}
            if architecture.endswith("ForMultipleChoice"):
                inputs = {key: x[None] for key, x in inputs.items()}
            for head, want in expected(architecture, theirs(**inputs)).items():
                have = model(tokens, types=types if typed else None, segments=mask if padded else None, head=head)
                if padded and have.shape[1] == LENGTHS[0] and have.dim() == 3:  # what padding says means nothing
                    have, want = have[mask.bool()], want[mask.bool()]
                close(have, want, tolerance)
        check_packing(model, tokens, types if typed else None)
        check_round_trip(model, directory)
    return model


def check_packing(model: Encoder, tokens: Tensor, types: Tensor | None) -> None:
    """Documents in one row equal each alone, for every head."""
    cuts = ((0, 6), (6, 13), (13, 16))  # the last token is padding
    segments = torch.zeros(1, tokens.shape[1], dtype=torch.long)
    for number, (a, b) in enumerate(cuts):
        segments[:, a:b] = number + 1
    row, row_types = tokens[:1], None if types is None else types[:1]
    for head in (None, *model.heads):
        packed = model(row, types=row_types, segments=segments, head=head)
        alone = [model(row[:, a:b], types=None if row_types is None else row_types[:, a:b], head=head) for a, b in cuts]
        if packed.dim() == 3:
            close(packed[:, :16], torch.cat(alone, 1))
        else:
            close(packed, torch.cat(alone))


def check_sizes(name: str, config: type, cls: Any, count: int | None = None) -> None:
    """A published size has as many parameters as the reference built from the same config.json, and `count`."""
    ours_config, hf = describe(name)
    with torch.device("meta"):
        ours, theirs = ours_config.build(), cls(config(**{k: v for k, v in hf.items() if k != "architectures"}))
    total = sum(p.numel() for p in ours.parameters())
    assert total == sum(p.numel() for p in theirs.parameters())
    assert count is None or total == count

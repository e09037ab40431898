"""Drafts while decoding: what they propose is what they say of the whole text, whatever is kept of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import landmark
from landmark.ctx import Bounds
from landmark.models.decoder import Decoder
from landmark.models.drafting import Drafting
from landmark.nn.attention import Attention
from landmark.nn.feedforward import GLU
from landmark.nn.latent import LatentAttention
from landmark.nn.mamba2 import Mamba2
from landmark.nn.mtp import IndependentDrafts, SequentialDrafts
from landmark.nn.norm import RMSNorm
from landmark.nn.residual import PreNorm
from landmark.nn.rope import Rope

from ..models.families import perturb

NORM = RMSNorm.Config()
MIXERS: dict[str, Any] = {
    "attention": Attention.Config(heads=2, kv_heads=1, head_dim=16, rope=Rope.Config()),
    "window": Attention.Config(heads=2, kv_heads=2, head_dim=16, rope=Rope.Config(), window=4),
    "latent": LatentAttention.Config(heads=2, kv_rank=16, head_dim=8, rope_dim=8, v_dim=8),
    "mamba2": Mamba2.Config(heads=4, head_dim=16),
}


def small(kind: str, depth: int, mixer: str) -> Decoder:
    """A decoder of two layers with drafts, all of one mixer, in float64."""
    layer = {
        "mix": PreNorm.Config(fn=MIXERS[mixer], norm=NORM),
        "ffn": PreNorm.Config(fn=GLU.Config(hidden=40), norm=NORM),
    }
    base: Any = landmark.build(
        {
            "architectures": ["LlamaForCausalLM"], "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 2,
        }
    )  # fmt: skip
    drafts = (
        SequentialDrafts.Config(depth=depth, layer=layer, norm=NORM)
        if kind == "sequential"
        else IndependentDrafts.Config(depth=depth, layer=layer, norm=NORM)
    )
    model = replace(base.cfg, layers=(layer, layer), drafts=drafts).build()
    perturb(model)
    return model.double().eval()


def of_the_whole(model: Decoder, text: list[int], proposed: list[int]) -> list[Tensor]:
    """Logits of every draft at the last token that was read, from one pass over the text and what was proposed."""
    tokens = torch.tensor([[*text, *proposed]])
    _, drafted = model.hidden_and_drafts(tokens, model.context(tokens))
    return [model.logits(made[0, len(text) - 2]) for made in drafted]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("kind", ["sequential", "independent"])
@torch.inference_mode()
def test_proposals_are_those_of_the_whole_text(kind: str, mixer: str) -> None:
    """Texts of different lengths, one of a single token; some proposals are kept, some refused; texts come and go."""
    model = small(kind, 3, mixer)
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> list[int]:
        return torch.randint(0, 61, (n,), generator=generator).tolist()

    texts = [some(n) for n in (9, 2, 5)]  # of each, the last token is drawn and not read
    state, drafting = model.new_state(3, 60), Drafting.of(model, 3, 60)
    fresh = [text[:-1] for text in texts]
    for round_, kept in enumerate([(0, 3, 1), (2, 0, 0), (1, 1, 1), (3, 3, 0)]):
        bounds = Bounds.of_lengths(tuple(map(len, fresh)))
        hidden, trunk = model.hidden_and_trunk(
            torch.tensor([[t for new in fresh for t in new]]), bounds=bounds, state=state
        )
        lengths = [n for _, n in bounds.sequences]
        following = [text[len(text) - n :] for text, n in zip(texts, lengths, strict=True)]
        seen: list[Tensor] = []

        def pick(k: int, logits: Tensor, seen: list[Tensor] = seen) -> Tensor:
            assert k == len(seen)
            seen.append(logits)
            return logits.argmax(1)

        count = 3 if round_ != 2 else 1
        parts = [list(x[0].split(lengths)) for x in (hidden, trunk)]
        proposed = drafting.propose(*parts, following, count, pick)
        assert proposed.shape == (len(texts), count)
        for i, text in enumerate(texts):
            whole = of_the_whole(model, text, proposed[i].tolist())
            for k in range(count):
                torch.testing.assert_close(seen[k][i], whole[k], rtol=1e-9, atol=1e-10)
        fresh = []
        for text, drafts, n in zip(texts, proposed.tolist(), kept, strict=False):
            new = [*drafts[:n], *some(1)]
            fresh.append([text[-1], *new[:-1]])
            text += new
        if round_ == 1:
            for held in (state, drafting):
                held.select([2, 0])
            texts, fresh = [texts[2], texts[0]], [fresh[2], fresh[0]]


@torch.inference_mode()
def test_the_embedding_alone_makes_a_difference() -> None:
    """Sequential modules see the token that was drawn; independent ones do not."""
    for kind, differs in (("sequential", True), ("independent", False)):
        model = small(kind, 1, "attention")
        logits: list[Tensor] = []

        def pick(_: int, x: Tensor, logits: list[Tensor] = logits) -> Tensor:
            logits.append(x)
            return x.argmax(1)

        hidden, trunk = model.hidden_and_trunk(torch.tensor([[3, 1, 4]]))
        for drawn in (1, 5):
            Drafting.of(model, 1, 8).propose([hidden[0]], [trunk[0]], [[1, 4, drawn]], 1, pick)
        assert bool((logits[0] != logits[1]).any()) is differs


def test_what_cannot_be() -> None:
    model = small("sequential", 2, "attention")
    hidden = [torch.zeros(1, 32, dtype=torch.float64)]
    with pytest.raises(ValueError, match="3 proposals of a model with 2 drafts"):
        Drafting.of(model, 1, 8).propose(hidden, hidden, [[1]], 3, lambda _, x: x.argmax(1))
    with pytest.raises(ValueError, match="this model has no drafts"):
        Drafting.of(replace(model.cfg, drafts=None).build(), 1, 8)
    with pytest.raises(ValueError, match=r"SequentialDrafts\.depth is 0"):
        SequentialDrafts.Config(depth=0, layer=model.cfg.layers[0], norm=NORM)

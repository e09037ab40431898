"""A model's own modules for further tokens (multi-token prediction) as the engine's drafter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...models.decoder import Decoder
from ...models.drafting import Drafting
from ..sampling import Sampler
from ..speculative.cost import own_cost
from .drafts import rehearsal
from .request import Run

LONGEST = 4096  # tokens that are kept to be read; of a longer text the modules read no more than its latest ones


class OwnDrafts:
    """The modules read what the model made of each text, and say what may follow, a text after the other; for one of
    which a beginning was remembered, they begin after it. Raises ValueError for a model without such modules."""

    follows = True

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.depth = Drafting.of(model, 1, 1).depth
        self.cost = own_cost(model)
        self.sampler = Sampler(vocab=model.cfg.head.vocab)
        self._draftings: dict[Run, Drafting] = {}
        self._heard: dict[Run, list[tuple[Tensor, Tensor]]] = {}

    def read(self, run: Run, hidden: Tensor, trunk: Tensor) -> None:
        heard = self._heard.setdefault(run, [])
        heard.append((hidden, trunk))
        while sum(len(one) for one, _ in heard) > LONGEST and len(heard) > 1:
            del heard[0]
            self._draftings.pop(run, None)

    def guess(self, asked: Sequence[tuple[Run, int]]) -> list[list[int]]:
        return [self._guess(run, most) for run, most in asked]

    def _guess(self, run: Run, most: int) -> list[int]:
        heard = self._heard.pop(run, [])
        if not heard:
            return []
        if run not in self._draftings:
            capacity = len(run.tokens) + run.writer.room + self.depth
            self._draftings[run] = Drafting.of(self.model, 1, capacity)
        hidden, trunk = (torch.cat(parts) for parts in zip(*heard, strict=True))
        self.sampler.arrange([rehearsal(run)])
        said: list[int] = []

        def pick(_: int, logits: Tensor) -> Tensor:
            said.extend(self.sampler.sample(logits))
            return torch.tensor([min(said[-1], self.sampler.vocab - 1)])

        following = run.tokens[len(run.tokens) - len(hidden) :]
        self._draftings[run].propose([hidden], [trunk], [following], min(most, self.depth), pick)
        return [token for token in said if token < self.sampler.vocab]

    def leave(self, run: Run) -> None:
        self._draftings.pop(run, None)
        self._heard.pop(run, None)

"""A decoder's own drafts at work while it decodes: what they propose, and what they remember (self-speculation).

    drafting = Drafting.of(model, slots, capacity)
    hidden, trunk = model.hidden_and_trunk(tokens, state=state)                 # and a next token is drawn from hidden
    proposed = drafting.propose(hidden, trunk, following, count, pick)          # tokens after that one
    ... the model reads them, keeps some; `propose` is told of the hidden states of those that were kept

What is proposed is what the drafts say of the text as a whole, `Decoder.hidden_and_drafts`: after every proposal they
forget what they read of tokens that were only proposed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ctx import Bounds, State
from ..nn.mtp import IndependentDrafts, SequentialDrafts
from .decoder import Decoder

Pick = Callable[[int, Tensor], Tensor]  # number of the proposal, logits [slots, vocab] -> tokens [slots]


class Drafting(ABC):
    """The drafts of a model and their decoding state, for `slots` sequences of up to `capacity` tokens."""

    def __init__(self, model: Decoder, slots: int, capacity: int) -> None:
        assert model.drafts is not None, "this model has no drafts"
        self.model, self.drafts, self.depth = model, model.drafts, model.drafts.depth
        made = self.drafts.new_state(slots=slots, capacity=capacity, dtype=model.dtype, device=model.device)
        self.states = [State(slots, [state], capacity) for state in made]

    @staticmethod
    def of(model: Decoder, slots: int, capacity: int) -> Drafting:
        """Raises ValueError for a model that foretells nothing but the next token."""
        if isinstance(model.drafts, SequentialDrafts):
            return SequentialDrafting(model, slots, capacity)
        if isinstance(model.drafts, IndependentDrafts):
            return IndependentDrafting(model, slots, capacity)
        raise ValueError("this model has no drafts; train it with the objective MultiToken, or load one that has them")

    @torch.inference_mode()
    def propose(
        self, hidden: Sequence[Tensor], trunk: Sequence[Tensor], following: Sequence[Sequence[int]], count: int,
        pick: Pick,
    ) -> Tensor:  # fmt: skip
        """Tokens [slots, count] to come after the last one of `following`; count is `depth` at most.

        For every sequence, of the tokens that the model has read since the last call (those that were taken back left
        out; at least one): their hidden states and what its last layer read of them, [n, dim] each, and the n tokens
        that follow each of them, of which it has yet to read the last.
        """
        if not 1 <= count <= self.depth:
            raise ValueError(f"{count} proposals of a model with {self.depth} drafts; ask for 1 to {self.depth}")
        return torch.stack(self._propose(list(hidden), list(trunk), [list(x) for x in following], count, pick), 1)

    @abstractmethod
    def _propose(
        self, hidden: list[Tensor], trunk: list[Tensor], following: list[list[int]], count: int, pick: Pick
    ) -> list[Tensor]: ...

    def select(self, slots: list[int]) -> None:
        """Keep and reorder sequences, in place."""
        for state in self.states:
            state.select(slots)

    def _step(self, k: int, hidden: list[Tensor], tokens: list[list[int]]) -> list[Tensor]:
        """Module k on more of every sequence, [n, dim] -> [n, dim]; n may be 0."""
        lengths = tuple(len(new) for new in hidden)
        if not any(lengths):
            return hidden
        state, flat = self.states[k], torch.cat(hidden)
        bounds = Bounds(len(lengths), lengths[0]) if len(set(lengths)) == 1 else Bounds.of_lengths(lengths)
        ids = torch.tensor([t for new in tokens for t in new], device=flat.device).view(bounds.rows, bounds.width)
        ctx = self.model.context(ids, bounds=bounds, state=state)
        x = flat.view(bounds.rows, bounds.width, -1)
        made = self.drafts.step(k, x, ids, self.model.embed, ctx, state.layers[0])
        state.lengths = [past + n for past, n in zip(state.lengths, lengths, strict=True)]
        return list(made.flatten(0, 1).split(lengths))

    def _pick(self, k: int, made: list[Tensor], pick: Pick) -> Tensor:
        return pick(k, self.model.logits(torch.stack([new[-1] for new in made])))


class IndependentDrafting(Drafting):
    """Every module reads the same, and nothing that is only proposed."""

    def _propose(
        self, hidden: list[Tensor], trunk: list[Tensor], following: list[list[int]], count: int, pick: Pick
    ) -> list[Tensor]:
        made = [self._step(k, trunk, following) for k in range(self.depth)]
        return [self._pick(k, made[k], pick) for k in range(count)]


class SequentialDrafting(Drafting):
    """Module k reads, for a token, what module k - 1 made of it, and the token k + 1 places on.

    Of the last k tokens these are proposals: what it makes of them is taken back. What module k - 1 made of the first
    of those k is certain, and waits in `carried`.
    """

    def __init__(self, model: Decoder, slots: int, capacity: int) -> None:
        super().__init__(model, slots, capacity)
        empty = torch.empty(0, model.cfg.dim, dtype=model.dtype, device=model.device)
        self.carried = [[empty] * slots for _ in range(self.depth)]

    def select(self, slots: list[int]) -> None:
        super().select(slots)
        self.carried = [[held[slot] for slot in slots] for held in self.carried]

    def _propose(
        self, hidden: list[Tensor], trunk: list[Tensor], following: list[list[int]], count: int, pick: Pick
    ) -> list[Tensor]:
        proposed: list[Tensor] = []
        said: list[list[int]] = [[] for _ in hidden]
        certain, tentative = hidden, [new[:0] for new in hidden]
        for k in range(self.depth):
            if k:
                reached = [torch.cat(pair) for pair in zip(self.carried[k], certain, strict=True)]
                self.carried[k] = [new[-1:] for new in reached]
                certain = [new[:-1] for new in reached]
                tentative = [torch.cat(pair) for pair in zip(self.carried[k], tentative, strict=True)]
            certain = self._step(k, certain, [_last(f, len(new)) for f, new in zip(following, certain, strict=True)])
            if k < count:
                before = self.states[k].snapshot()
                tentative = self._step(k, tentative, [_last(s, len(x)) for s, x in zip(said, tentative, strict=True)])
                self.states[k].restore(before)
                proposed.append(self._pick(k, [torch.cat(p) for p in zip(certain, tentative, strict=True)], pick))
                for text, token in zip(said, proposed[k].tolist(), strict=True):
                    text.append(token)
        return proposed


def _last(tokens: list[int], count: int) -> list[int]:
    return tokens[len(tokens) - count :]

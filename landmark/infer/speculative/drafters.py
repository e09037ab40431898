"""What proposes tokens: the text itself, a smaller model, or the model's own modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...models.decoder import Decoder
from ...models.drafting import Drafting
from ..sampling import Row, Sampler, Sampling
from .cost import draft_cost, own_cost
from .reader import Reader


@dataclass(frozen=True)
class Proposal:
    """Tokens [n, k] for n sequences, and the probabilities [n, k, V] that they were drawn from, if they were drawn."""

    tokens: Tensor
    q: Tensor | None


class Drafter(Protocol):
    """What proposes tokens. `cost` is that of one proposal, relative to a call of the model."""

    cost: float

    def begin(self, reader: Reader, rows: Sequence[Row], capacity: int) -> None:
        """Get ready for sequences that `reader` reads, of which `rows` have prompt, settings and answer so far."""

    def propose(self, texts: Sequence[Sequence[int]], count: int) -> Proposal:
        """Up to `count` tokens to follow each text (prompt and answer), which only ever grows."""

    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences, in this order."""


class Lookup:
    """Prompt lookup (Saxena 2023): what followed the last `longest` tokens (or fewer) where they stood before."""

    cost = 0.0

    def __init__(self, longest: int = 3) -> None:
        if longest < 1:
            raise ValueError(f"longest is {longest}; look for at least 1 token")
        self.longest = longest

    def begin(self, reader: Reader, rows: Sequence[Row], capacity: int) -> None:
        pass

    def propose(self, texts: Sequence[Sequence[int]], count: int) -> Proposal:
        found = [self._follow(text, count) for text in texts]
        longest = max(map(len, found))
        filled = [tokens + [0] * (longest - len(tokens)) for tokens in found]
        return Proposal(torch.tensor(filled, dtype=torch.long).view(len(texts), longest), None)

    def _follow(self, text: Sequence[int], count: int) -> list[int]:
        for size in range(min(self.longest, len(text) - 1), 0, -1):
            tail = list(text[-size:])
            for start in range(len(text) - size - 1, -1, -1):
                if text[start] == tail[0] and list(text[start : start + size]) == tail:
                    return list(text[start + size : start + size + count])
        return []

    def select(self, rows: Sequence[int]) -> None:
        pass


class ModelDrafter:
    """A smaller decoder with the same vocabulary, which draws by the same settings as the request."""

    def __init__(self, model: Decoder) -> None:
        if model.training:
            raise ValueError("the drafting model is in training mode; call eval() before it drafts")
        self.model, self.cost = model, 0.0

    def begin(self, reader: Reader, rows: Sequence[Row], capacity: int) -> None:
        own, its = self.model.cfg.head.vocab, reader.model.cfg.head.vocab
        if own != its:
            raise ValueError(
                f"the drafting model has a vocabulary of {own}, the model one of {its}; they must be equal"
            )
        self.cost = draft_cost(self.model, reader.model)
        self.reader = Reader(self.model, len(rows), capacity)
        self.rows = list(rows)

    def propose(self, texts: Sequence[Sequence[int]], count: int) -> Proposal:
        reader = self.reader
        fresh = []
        for text, held in zip(texts, reader.texts, strict=True):
            same = next(
                (i for i, (a, b) in enumerate(zip(text, held, strict=False)) if a != b), min(len(text), len(held))
            )
            assert same == len(held) < len(text), "the drafter's text is no beginning of the sequence's"
            fresh.append(list(text[same:]))
        sampler = Sampler(vocab=self.model.cfg.head.vocab)
        said: list[list[int]] = [[] for _ in texts]
        probabilities: list[Tensor] = []
        certain = all(plainly_greedy(row.settings) for row in self.rows)  # chosen, not drawn
        last = torch.stack([logits[-1] for logits in reader.read(fresh)])
        self._certain = reader.state.snapshot() if not reader._plain else list(reader.state.lengths)
        self._held = [list(text) for text in reader.texts]
        for step in range(count):
            if certain:
                picked = last.argmax(1).tolist()
            else:
                rows = zip(self.rows, said, strict=True)
                sampler.arrange([said_so_far(row, [*row.answer, *more]) for row, more in rows])
                q = distribution(sampler, last)
                probabilities.append(q)
                picked = [_pick(p, row) for p, row in zip(q, self.rows, strict=True)]
            for more, token in zip(said, picked, strict=True):
                more.append(token)
            if step < count - 1:
                last = torch.stack([logits[-1] for logits in reader.read([[more[-1]] for more in said])])
        self._forget()
        return Proposal(torch.tensor(said), None if certain else torch.stack(probabilities, 1))

    def _forget(self) -> None:
        """Back to the texts that are certain."""
        reader = self.reader
        if reader._plain:
            reader.state.lengths = list(self._certain)
        else:
            reader.state.restore(self._certain)
        reader.texts = self._held

    def select(self, rows: Sequence[int]) -> None:
        self.reader.select(rows)
        self.rows = [self.rows[row] for row in rows]


class OwnDrafts:
    """The model's own modules for further tokens (multi-token prediction); no more proposals than it has modules."""

    cost = 0.0

    def begin(self, reader: Reader, rows: Sequence[Row], capacity: int) -> None:
        reader.follow = True
        self.drafting = Drafting.of(reader.model, len(rows), capacity)
        self.reader, self.rows = reader, list(rows)
        self.cost = own_cost(reader.model)

    def propose(self, texts: Sequence[Sequence[int]], count: int) -> Proposal:
        hidden, trunk = self.reader.take()
        sampler = Sampler(vocab=self.reader.model.cfg.head.vocab)
        said: list[list[int]] = [[] for _ in texts]
        probabilities = []

        def pick(_: int, logits: Tensor) -> Tensor:
            sampler.arrange([said_so_far(row, [*row.answer, *more]) for row, more in zip(self.rows, said, strict=True)])
            q = distribution(sampler, logits)
            probabilities.append(q)
            tokens = [_pick(p, row) for p, row in zip(q, self.rows, strict=True)]
            for more, token in zip(said, tokens, strict=True):
                more.append(token)
            return torch.tensor(tokens)

        following = [text[len(text) - len(new) :] for text, new in zip(texts, hidden, strict=True)]
        tokens = self.drafting.propose(hidden, trunk, following, min(count, self.drafting.depth), pick)
        return Proposal(tokens, torch.stack(probabilities, 1))

    def select(self, rows: Sequence[int]) -> None:
        self.drafting.select(list(rows))
        self.rows = [self.rows[row] for row in rows]


def distribution(sampler: Sampler, logits: Tensor) -> Tensor:
    """The probabilities [B, V] that the sampler's next tokens are drawn from."""
    x = sampler.process(logits).float()
    greedy = torch.tensor([row.settings.greedy for row in sampler._rows], device=x.device)
    only = torch.zeros_like(x).scatter_(1, x.argmax(1, keepdim=True), 1.0)
    return torch.where(greedy[:, None], only, x.softmax(1))


def plainly_greedy(settings: Sampling) -> bool:
    """Whether the likeliest token is always taken, whatever was said before."""
    penalties = settings.repetition_penalty, settings.presence_penalty, settings.frequency_penalty
    return settings.greedy and not settings.logit_bias and penalties == (1.0, 0.0, 0.0)


def said_so_far(row: Row, answer: list[int]) -> Row:
    """The same request, had it said this."""
    return Row(row.settings, row.prompt, row.random, answer)


def _pick(p: Tensor, row: Row) -> int:
    if row.settings.greedy:
        return int(p.argmax())
    total = p.double().cumsum(0)
    return min(int(torch.searchsorted(total, row.random.random() * total[-1], right=True)), len(p) - 1)

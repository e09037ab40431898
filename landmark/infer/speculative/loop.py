"""Speculation from call to call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.decoder import Decoder
from ...weights.tokenizer import Tokenizer
from ..generate import Event, Request, request
from ..sampling import BROKEN, Row, Sampler, Sampling
from ..session import room_after
from .drafters import Drafter, Proposal, distribution, plainly_greedy, said_so_far
from .pace import Cost, Pace
from .reader import Reader
from .verify import verify


@dataclass
class Figures:
    """How a run went: calls of the model, proposals, how many of them were kept, tokens said."""

    calls: int = 0
    proposed: int = 0
    kept: int = 0
    tokens: int = 0

    @property
    def acceptance(self) -> float:
        """The share of proposals that were kept, among those that were looked at."""
        return self.kept / max(1, self.proposed)


@torch.inference_mode()
def speculate(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling] = Sampling(), *,
    drafter: Drafter, tokenizer: Tokenizer | None = None, most: int = 8, length: int | None = None,
    guides: Sequence[Any] | None = None, figures: Figures | None = None,
) -> Iterator[Event]:  # fmt: skip
    """Tokens as they come, as `generate.stream` gives them: equal to it where greedy, equal in distribution where not.

    `length` proposals a call; None: as many, up to `most`, as the acceptance so far makes worth their cost. `guides`:
    one for each prompt (or None), with `allowed`, `accept`, `rollback` and `finished`, as `constrain.Form`.
    Raises ValueError as `generate.stream`, and for models that cannot take part.
    """
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    rooms = room_after(model, prompts, [s.max_tokens for s in settings])
    if most < 1 or (length is not None and length < 1):
        raise ValueError(f"{length or most} proposals a call; propose at least 1")
    each = [
        request(model, n, prompt, s, room, tokenizer)
        for n, (prompt, s, room) in enumerate(zip(prompts, settings, rooms, strict=True))
    ]
    vocab = model.cfg.head.vocab
    rows = [Row.of(s, prompt, vocab) for s, prompt in zip(settings, prompts, strict=True)]
    forms = list(guides) if guides is not None else [None] * len(rows)
    figures = figures if figures is not None else Figures()
    extra = length or most
    capacity = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True)) + extra + 1
    run = _Run(model, each, rows, forms, drafter, capacity, figures)
    yield from run.begin(prompts)
    pace, cost = Pace(), Cost.on(model.device, drafter.cost)
    while run.requests:
        wanted = length
        if wanted is None:
            wanted = min(most, pace.ahead(figures.calls, cost.needed(len(run.requests))))
        yield from run.step(max(1, min(wanted, *run.rooms())) if wanted else 0)
        for right in run.right if run.guesses else ():
            pace.judge(run.guesses, right, figures.calls)


class _Run:
    """The sequences that are not finished."""

    def __init__(
        self, model: Decoder, requests: list[Request], rows: list[Row], forms: list[Any], drafter: Drafter,
        capacity: int, figures: Figures,
    ) -> None:  # fmt: skip
        self.model, self.requests, self.rows, self.forms = model, requests, rows, forms
        self.drafter, self.figures = drafter, figures
        self.guesses, self.right = 0, list[int]()  # of the last call, for each sequence, and how many were kept
        self.reader = Reader(model, len(rows), capacity)
        drafter.begin(self.reader, rows, capacity)

    def rooms(self) -> list[int]:
        """Proposals beyond what may still be said are of no use."""
        return [request.room for request in self.requests]

    def begin(self, prompts: Sequence[Sequence[int]]) -> Iterator[Event]:
        last = torch.stack([logits[-1] for logits in self.reader.read(prompts)])
        self.figures.calls += 1
        none = torch.zeros(len(self.rows), 0, dtype=torch.long)
        yield from self._finish(last[:, None], Proposal(none, None), first=True)

    def step(self, count: int) -> Iterator[Event]:
        texts = [[*row.prompt, *row.answer] for row in self.rows]
        none = Proposal(torch.zeros(len(texts), 0, dtype=torch.long), None)
        proposal = self.drafter.propose(texts, count) if count else none
        said = [[row.answer[-1], *drafts] for row, drafts in zip(self.rows, proposal.tokens.tolist(), strict=True)]
        logits = torch.stack(self.reader.read(said))
        self.figures.calls += 1
        yield from self._finish(logits, proposal)

    def _finish(self, logits: Tensor, proposal: Proposal, first: bool = False) -> Iterator[Event]:
        """Keep what may be kept of a proposal, from logits [n, k + 1, V]."""
        drafts = proposal.tokens.tolist()
        each = zip(self.forms, self.rows, strict=True)
        plain = all(form is None and plainly_greedy(row.settings) for form, row in each)
        if plain and proposal.q is None:
            counts, next_tokens = self._likeliest(logits, drafts)
        else:
            counts, next_tokens = self._drawn(logits, proposal, drafts)
        going, kept = [], []
        n, places, _ = logits.shape
        self.guesses, self.right = places - 1, counts
        for i, (count, token) in enumerate(zip(counts, next_tokens, strict=True)):
            self.figures.proposed += min(count + 1, places - 1)
            self.figures.kept += count
            over = False
            for said in (*drafts[i][:count], token):
                self.rows[i].answer.append(said)
                form = self.forms[i]
                if form is not None:
                    form.accept(said)
                event = self.requests[i].event(said, None, complete=form is not None and form.finished)
                self.figures.tokens += 1
                yield event
                if event.finish is not None:
                    over = True
                    break
            if not over:
                going.append(i)
            kept.append(count + 1)
        if not first:
            self.reader.keep(kept)
        if len(going) < n:
            self._select(going)

    def _likeliest(self, logits: Tensor, drafts: list[list[int]]) -> tuple[list[int], list[int]]:
        """How many proposals are what is taken anyway, and what follows them."""
        most, best = logits.max(2)
        if not bool((most > -math.inf).all()):
            raise ValueError(BROKEN)
        said = best.tolist()
        counts = [
            next((j for j, (a, b) in enumerate(zip(row, guesses, strict=False)) if a != b), len(guesses))
            for row, guesses in zip(said, drafts, strict=True)
        ]
        return counts, [row[count] for row, count in zip(said, counts, strict=True)]

    def _drawn(self, logits: Tensor, proposal: Proposal, drafts: list[list[int]]) -> tuple[list[int], list[int]]:
        """How many proposals are kept, and what follows them, in distribution as it would be without them."""
        n, places, vocab = logits.shape
        if not bool(logits.isfinite().any(2).all()):
            raise ValueError(BROKEN)
        logits = self._guided(logits, drafts)
        sampler = Sampler(vocab=vocab)
        sampler.arrange(
            [said_so_far(row, [*row.answer, *drafts[i][:j]]) for i, row in enumerate(self.rows) for j in range(places)]
        )
        p = distribution(sampler, logits.flatten(0, 1)).view(n, places, vocab)
        uniform = torch.tensor([[row.random.random() for _ in range(places)] for row in self.rows], dtype=torch.float64)
        counts, next_tokens = verify(p, proposal.q, proposal.tokens.to(p.device), uniform.to(p.device))
        return counts.tolist(), next_tokens.tolist()

    def _guided(self, logits: Tensor, drafts: list[list[int]]) -> Tensor:
        """What a form does not allow is impossible, at every place as far as the proposals keep to it."""
        if all(form is None for form in self.forms):
            return logits
        logits = logits.clone()
        for i, form in enumerate(self.forms):
            taken = 0
            for j in range(logits.shape[1]) if form is not None else ():
                allowed = form.allowed().to(logits.device)
                logits[i, j].masked_fill_(~allowed, -math.inf)
                if j == logits.shape[1] - 1 or not allowed[drafts[i][j]]:
                    break
                form.accept(drafts[i][j])
                taken += 1
                if form.finished:
                    break
            if taken:
                form.rollback(taken)
        return logits

    def _select(self, going: list[int]) -> None:
        if going:
            self.reader.select(going)
            self.drafter.select(going)
        self.requests = [self.requests[i] for i in going]
        self.rows, self.forms = [self.rows[i] for i in going], [self.forms[i] for i in going]

"""Speculative decoding (Leviathan et al. 2023): a cheap drafter proposes, the model reads all proposals in one call,
and what it keeps is distributed exactly as if it had drawn token by token.

    for event in speculate(model, [prompt], Sampling(temperature=0.7), drafter=ModelDrafter(small)): ...
    for event in speculate(model, [prompt], greedy, drafter=Lookup()): ...

A proposal x is kept with probability min(1, p(x) / q(x)); the first that is not is replaced by a draw from the positive
part of p - q, made to sum to 1; if all are kept, one more token is drawn from p (algorithm 1). With acceptance rate a
and g proposals a call gives (1 - a^(g + 1)) / (1 - a) tokens on average (eq. 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ctx import Bounds
from ..models.decoder import Decoder
from ..models.drafting import Drafting
from ..models.inspect import forward_flops
from ..nn.cache import KVCache
from ..weights.tokenizer import Tokenizer
from .generate import Event, Request, request
from .sampling import BROKEN, Row, Sampler, Sampling
from .session import room_after, turning_lengths


def verify(p: Tensor, q: Tensor | None, drafts: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Which proposals are kept, and what follows them.

    p [n, k + 1, V]: the model's probabilities at every place; q [n, k, V]: those that `drafts` [n, k] were drawn from,
    None where they were not drawn but chosen; uniform [n, k + 1] in [0, 1). -> counts [n] in 0 ... k, tokens [n].
    """
    n, k = drafts.shape
    chosen = p[:, :k].gather(2, drafts[..., None]).squeeze(2)
    drawn = torch.ones_like(chosen) if q is None else q.gather(2, drafts[..., None]).squeeze(2)
    kept = uniform[:, :k] * drawn < chosen
    counts = kept.long().cumprod(1).sum(1)
    rows = torch.arange(n, device=p.device)
    rest, at = p[rows, counts].double(), counts.clamp_max(k - 1) if k else counts
    if k:
        refused = (counts < k)[:, None]
        less = torch.nn.functional.one_hot(drafts[rows, at], p.shape[2]) if q is None else q[rows, at]
        left = (rest - less.double()).clamp_min(0)
        # Rounding may leave nothing where p and q are equal: then p itself is right.
        rest = torch.where(refused & (left.sum(1, keepdim=True) > 0), left, rest)
    total = rest.cumsum(1)
    tokens = torch.searchsorted(total, (uniform[:, k:].double() * total[:, -1:]).contiguous(), right=True).squeeze(1)
    return counts, tokens.clamp_max(p.shape[2] - 1)


def expected_tokens(acceptance: float, proposals: int) -> float:
    """Tokens that a call of the model gives on average (eq. 1)."""
    return proposals + 1.0 if acceptance == 1 else (1 - acceptance ** (proposals + 1)) / (1 - acceptance)


def best_length(acceptance: float, cost: float, most: int) -> int:
    """How many proposals give the most tokens for the work, where one costs `cost` calls of the model (eq. 2)."""
    return max(range(most + 1), key=lambda g: (expected_tokens(acceptance, g) / (g * cost + 1), -g))


class Reader:
    """A decoder that reads sequences and can forget what it read last, whatever kinds of state it has.

    Keys and values of tokens that are taken back are simply overwritten. Other states are put back as they were before
    the last call, and what is kept of that call is read again.
    """

    def __init__(self, model: Decoder, slots: int, capacity: int) -> None:
        if turning_lengths(model):
            raise ValueError("a model whose rotations change with the length of the text (LongRoPE) cannot speculate")
        self.model, self.state = model, model.new_state(slots, capacity)
        self.texts: list[list[int]] = [[] for _ in range(slots)]
        self._plain = all(isinstance(leaf, KVCache) for leaf in self.state.leaves())
        self._before: Any = None
        self._read: list[list[int]] = [[] for _ in range(slots)]
        self.follow = False  # whether to keep for `take` what the model made of the tokens
        self._seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(slots)]

    def read(self, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """Append at least one token to every sequence -> logits [tokens, vocab] after each of them."""
        self._before = None if self._plain else (self.state.snapshot(), [list(text) for text in self.texts])
        self._read = [list(new) for new in tokens]
        lengths = [len(new) for new in tokens]
        device = self.model.device
        if len(set(lengths)) == 1:
            ids, bounds = torch.tensor(self._read, device=device), None
        else:
            ids = torch.tensor([[token for new in tokens for token in new]], device=device)
            bounds = Bounds.of_lengths(tuple(lengths))
        if self.follow:
            hidden, trunk = self.model.hidden_and_trunk(ids, bounds=bounds, state=self.state)
            parts = (x.flatten(0, 1).split(lengths) for x in (hidden, trunk))
            for seen, pair in zip(self._seen, zip(*parts, strict=True), strict=True):
                seen.append(pair)
        else:
            hidden = self.model.hidden(ids, bounds=bounds, state=self.state)
        for text, new in zip(self.texts, tokens, strict=True):
            text += new
        return list(self.model.logits(hidden.flatten(0, 1)).split(lengths))

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states and what the last layer read, [n, dim] each for every sequence, of the tokens that were read
        and kept since the last time."""
        pairs = [[torch.cat(x) for x in zip(*seen, strict=True)] for seen in self._seen]
        self._seen = [[] for _ in pairs]
        return [hidden for hidden, _ in pairs], [trunk for _, trunk in pairs]

    def keep(self, counts: Sequence[int]) -> None:
        """Of the last call's tokens keep so many of each sequence, at least one."""
        if all(count == len(new) for count, new in zip(counts, self._read, strict=True)):
            return
        if self._plain:
            for i, (count, new) in enumerate(zip(counts, self._read, strict=True)):
                self.state.lengths[i] -= len(new) - count
                del self.texts[i][len(self.texts[i]) - len(new) + count :]
                if self.follow:
                    hidden, trunk = self._seen[i].pop()
                    self._seen[i].append((hidden[:count], trunk[:count]))
            return
        for seen in self._seen if self.follow else ():
            seen.pop()
        snapshot, self.texts = self._before
        self.state.restore(snapshot)
        self.read([new[:count] for count, new in zip(counts, self._read, strict=True)])

    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences, in this order."""
        self.state.select(list(rows))
        self.texts = [self.texts[row] for row in rows]
        self._read = [self._read[row] for row in rows]
        self._seen = [self._seen[row] for row in rows]


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
        """`count` tokens to follow each text (prompt and answer), which only ever grows."""

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
        return Proposal(torch.tensor([self._follow(text, count) for text in texts]), None)

    def _follow(self, text: Sequence[int], count: int) -> list[int]:
        for size in range(min(self.longest, len(text) - 1), 0, -1):
            tail = list(text[-size:])
            for start in range(len(text) - size - 1, -1, -1):
                if text[start] == tail[0] and list(text[start : start + size]) == tail:
                    found = list(text[start + size : start + size + count])
                    return found + [found[-1]] * (count - len(found))
        return [text[-1]] * count

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
        self.cost = forward_flops(self.model, 512) / forward_flops(reader.model, 512)
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
        probabilities = []
        last = torch.stack([logits[-1] for logits in reader.read(fresh)])
        self._certain = reader.state.snapshot() if not reader._plain else list(reader.state.lengths)
        self._held = [list(text) for text in reader.texts]
        for step in range(count):
            sampler.arrange([_row(row, [*row.answer, *more]) for row, more in zip(self.rows, said, strict=True)])
            q = distribution(sampler, last)
            probabilities.append(q)
            picked = torch.tensor([_pick(p, row) for p, row in zip(q, self.rows, strict=True)])
            for more, token in zip(said, picked.tolist(), strict=True):
                more.append(token)
            if step < count - 1:
                last = torch.stack([logits[-1] for logits in reader.read([[more[-1]] for more in said])])
        self._forget()
        return Proposal(torch.tensor(said), torch.stack(probabilities, 1))

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
        whole, head = forward_flops(reader.model, 512), 2 * reader.model.cfg.dim * reader.model.cfg.head.vocab
        self.cost = ((whole - head) / len(reader.model.layers) + head) / whole  # a layer, and the head

    def propose(self, texts: Sequence[Sequence[int]], count: int) -> Proposal:
        hidden, trunk = self.reader.take()
        sampler = Sampler(vocab=self.reader.model.cfg.head.vocab)
        said: list[list[int]] = [[] for _ in texts]
        probabilities = []

        def pick(_: int, logits: Tensor) -> Tensor:
            sampler.arrange([_row(row, [*row.answer, *more]) for row, more in zip(self.rows, said, strict=True)])
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


def _row(row: Row, answer: list[int]) -> Row:
    """The same request, had it said this."""
    return Row(row.settings, row.prompt, row.random, answer)


def _pick(p: Tensor, row: Row) -> int:
    if row.settings.greedy:
        return int(p.argmax())
    total = p.double().cumsum(0)
    return min(int(torch.searchsorted(total, row.random.random() * total[-1], right=True)), len(p) - 1)


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
    rate = 0.7
    while run.requests:
        wanted = length if length is not None else best_length(rate, drafter.cost, most)
        before = figures.kept, figures.proposed
        yield from run.step(max(1, min(wanted, *run.rooms())) if wanted else 0)
        if figures.proposed > before[1]:
            seen = (figures.kept - before[0]) / (figures.proposed - before[1])
            rate = min(0.98, 0.8 * rate + 0.2 * seen)
        elif not wanted:
            rate = min(0.98, rate + 0.02)  # try again at some time


class _Run:
    """The sequences that are not finished."""

    def __init__(
        self, model: Decoder, requests: list[Request], rows: list[Row], forms: list[Any], drafter: Drafter,
        capacity: int, figures: Figures,
    ) -> None:  # fmt: skip
        self.model, self.requests, self.rows, self.forms = model, requests, rows, forms
        self.drafter, self.figures = drafter, figures
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
        n, places, vocab = logits.shape
        if not bool(logits.isfinite().any(2).all()):
            raise ValueError(BROKEN)
        drafts = proposal.tokens.tolist()
        logits = self._guided(logits, drafts)
        sampler = Sampler(vocab=vocab)
        sampler.arrange(
            [_row(row, [*row.answer, *drafts[i][:j]]) for i, row in enumerate(self.rows) for j in range(places)]
        )
        p = distribution(sampler, logits.flatten(0, 1)).view(n, places, vocab)
        uniform = torch.tensor([[row.random.random() for _ in range(places)] for row in self.rows], dtype=torch.float64)
        uniform = uniform.to(p.device)
        counts, next_tokens = verify(p, proposal.q, proposal.tokens.to(p.device), uniform)
        going, kept = [], []
        for i, (count, token) in enumerate(zip(counts.tolist(), next_tokens.tolist(), strict=True)):
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

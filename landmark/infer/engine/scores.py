"""Log-probabilities: of what was said, of prompts, and of whole answers of which the best are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...models.decoder import Decoder
from ..generate import Event
from ..sampling import Sampler
from .request import Run, Scored, Ticket
from .scheduler import Work


def logprobs(
    sampler: Sampler, runs: Sequence[Run], tokens: Sequence[int], logits: Tensor
) -> tuple[dict[int, float], dict[int, tuple[Scored, ...]]]:
    """By row: the log-probability of the token that was drawn just now, and the likeliest tokens with theirs."""
    chosen: dict[int, float] = {}
    likeliest: dict[int, tuple[Scored, ...]] = {}
    wanted = [n for n, run in enumerate(runs) if run.ticket.logprobs is not None]
    for which in ("model", "sampled") if wanted else ():
        rows = [n for n in wanted if runs[n].ticket.logprobs == which]
        if not rows:
            continue
        table = sampler.log_distribution(logits, rows, which)
        picked = torch.tensor([min(tokens[n], table.shape[1] - 1) for n in rows], device=table.device)
        chosen |= zip(rows, table.gather(1, picked[:, None]).squeeze(1).tolist(), strict=True)
        tops = [runs[n].ticket.request.top for n in rows]
        likeliest |= zip(rows, _top(table, tops), strict=True)
    return chosen, likeliest


def score_prompts(model: Decoder, works: Sequence[Work], ends: Sequence[int], hidden: Tensor) -> None:
    """Log-probabilities of those tokens of prompts that the call's tokens, hidden [tokens, dim], foretell."""
    for work, end in [(w, end) for w, end in zip(works, ends, strict=True) if w.run.ticket.scoring]:
        run, ticket = work.run, work.run.ticket
        first = run.computed - work.count
        foretold = ticket.request.prompt[first + 1 : run.computed + 1]
        skip = len(ticket.scored) - first  # a sequence that begins again has some of them
        if skip < 0 or not foretold[skip:]:
            continue
        start = end + 1 - work.count + skip
        table = model.logits(hidden[start : start + len(foretold) - skip]).float().log_softmax(1)
        own = table.gather(1, torch.tensor(foretold[skip:], device=table.device)[:, None]).squeeze(1).tolist()
        tops = _top(table, [ticket.request.prompt_logprobs or 0] * len(own))
        ticket.scored += [((t, p), top) for t, p, top in zip(foretold[skip:], own, tops, strict=True)]
        ticket.scoring = len(ticket.scored) < len(ticket.request.prompt) - 1


def best(ticket: Ticket, events: Sequence[Event]) -> list[Event]:
    """Nothing until all candidates are finished; then the events of the likeliest ones (per token), the best first."""
    for event in events:
        ticket.runs[event.index].events.append(event)
    if ticket.unfinished:
        return []

    def likelihood(run: Run) -> float:
        return sum(event.logprob or 0.0 for event in run.events) / len(run.events)

    found = sorted(ticket.runs, key=likelihood, reverse=True)[: ticket.request.n]
    return [replace(event, index=n) for n, run in enumerate(found) for event in run.events]


def _top(table: Tensor, counts: Sequence[int]) -> list[tuple[Scored, ...]]:
    """The likeliest tokens of each row, by rows' counts."""
    if not any(counts):
        return [()] * len(counts)
    values, ids = table.topk(min(max(counts), table.shape[1]), 1)
    rows = zip(ids.tolist(), values.tolist(), counts, strict=True)
    return [tuple(zip(i[:n], v[:n], strict=True)) for i, v, n in rows]

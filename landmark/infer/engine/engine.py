"""The engine: one model, many requests, one call of the model a step."""

from __future__ import annotations

import itertools
import math
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...ctx import Bounds
from ...models.decoder import Decoder
from ...transforms.lora import Adapters, check_rows
from ...weights.tokenizer import Tokenizer
from ..defaults import stop_ids
from ..generate import Answer, Event
from ..generate import request as writer
from ..sampling import BROKEN, Row, Sampler
from ..session import room_after
from .drafts import Lookup
from .handle import Handle, wake
from .lengths import Lengths
from .request import Request, Run, Scored, Ticket
from .scheduler import Scheduler, Work
from .store import Store

AGE = 10.0  # seconds that one level of priority is worth


@dataclass
class Stats:
    """Figures since the engine was made; from `running` on, of this moment."""

    steps: int = 0
    seconds: float = 0.0  # in steps
    computed_tokens: int = 0
    cached_tokens: int = 0  # of prompts, found and not computed
    new_tokens: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    preempted: int = 0
    crashes: int = 0
    proposed: int = 0  # tokens that were guessed and compared with what was drawn
    kept: int = 0  # those of them that were right
    running: int = 0
    waiting: int = 0
    used: float = 0.0  # share of the blocks (slots, for models without) that sequences hold


class Engine:
    """See the package's docstring."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        memory: int = 1 << 30,
        max_batch: int = 64,
        chunk: int = 512,
        block: int = 32,
        prefixes: bool = True,
        interval: int = 512,
        drafter: Literal["lookup"] | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        if not isinstance(model, Decoder):
            raise ValueError(f"the engine serves decoders; a {type(model).__name__} is served by infer.generate")
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() before it generates")
        for name, value in (("max_batch", max_batch), ("chunk", chunk), ("block", block), ("interval", interval)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        if drafter not in (None, "lookup"):
            raise ValueError(f"drafter is {drafter!r}; the engine can draft by lookup, or not at all (None)")
        self._drafter, self.adapters = drafter, adapters or Adapters()
        check_rows(model, self.adapters)
        self._lengths = lengths = Lengths.of(model)
        if lengths.plain is not None:
            if drafter is not None:
                raise ValueError("a model whose rotations change with the length of the text cannot speculate")
            chunk = max(chunk, model.cfg.context or chunk)  # it reads long texts in one call
        interval = -(-interval // block) * block

        def begin() -> tuple[Store, Scheduler, Sampler]:
            store = Store(
                model,
                memory=memory,
                max_batch=max_batch,
                block=block,
                chunk=chunk,
                prefixes=prefixes,
                interval=interval,
                lengths=lengths,
            )
            return store, Scheduler(store, max_batch=max_batch, chunk=chunk), Sampler(vocab=model.cfg.head.vocab)

        self._begin = begin  # again after a crash
        self._store, self._scheduler, self._sampler = begin()
        self._stop_ids = stop_ids(model, tokenizer)
        self._stats = Stats()
        self._numbers = itertools.count()
        self._handles: dict[Ticket, Handle] = {}
        self._inbox: list[Ticket] = []
        self._withdrawn: list[Ticket] = []
        self._lock = threading.Condition()
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False

    # -- requests --------------------------------------------------------------------------------------------------

    @property
    def longest(self) -> int | None:
        """The longest text, in tokens, that a sequence may have: the model's context, or what the memory holds."""
        limits = [n for n in (self.model.cfg.context, self._store.capacity) if n is not None]
        return min(limits)

    def submit(self, request: Request) -> Handle:
        """Take a request in; from any thread. Raises ValueError for one that cannot be served: a prompt that is empty
        or too long, tokens that the vocabulary lacks, stop strings without a tokenizer, an adapter that it lacks."""
        sampling, prompt = request.sampling, request.prompt
        adapter = self.adapters.number(request.adapter)
        room = room_after(self.model, [prompt], [sampling.max_tokens])[0]
        if len(prompt) > self._store.capacity:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, more than the {self._store.capacity} that the engine's memory "
                "holds; give it more memory"
            )
        room = min(room, self._store.capacity - len(prompt) + 1)
        if sampling.stop_ids is None:
            sampling = replace(sampling, stop_ids=self._stop_ids)
        number = next(self._numbers)
        ticket = Ticket(request, (time.monotonic() - AGE * request.priority, number), adapter)
        for n in range(request.candidates):
            own = sampling if sampling.seed is None or n == 0 else replace(sampling, seed=sampling.seed + n)
            row = Row.of(own, prompt, self._sampler.vocab)
            lookup = Lookup() if self._drafter else None
            ticket.runs.append(Run(ticket, writer(self.model, n, prompt, own, room, self.tokenizer), row, lookup))
        handle = Handle(self, ticket)
        with self._lock:
            self._handles[ticket] = handle
            self._inbox.append(ticket)
            self._lock.notify_all()
        return handle

    def cancel(self, handle: Handle) -> None:
        """As `Handle.cancel`."""
        with self._lock:
            self._withdrawn.append(handle._ticket)
            self._lock.notify_all()

    def generate(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """The answers to many requests, in their order."""
        handles = [self.submit(request) for request in requests]
        return [handle.result() for handle in handles]

    # -- the thread ------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether a thread of the engine's own makes the steps."""
        return self._thread is not None

    def start(self) -> Engine:
        """Make steps in a thread of its own, whenever there is work."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread; requests that are not finished fail."""
        thread = self._thread
        if thread is None:
            return
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        thread.join()
        self._thread = None
        self._fail(list(self._handles), "the engine was stopped")

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._stopping or self._inbox or self._withdrawn or self._scheduler.busy)
                if self._stopping:
                    return
            try:
                self.step()
            except Exception as error:  # state could not be made anew; nobody is to wait for an engine that stands
                traceback.print_exception(error)
                with self._lock:
                    self._tell(list(self._handles), f"the engine has ended: {type(error).__name__}: {error}")
                    self._thread = None
                return

    # -- a step ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> bool:
        """One call of the model for all that can run; whether there is more to do. An error fails the requests that
        were running, and the engine goes on with those that wait."""
        with self._stepping:
            began = time.perf_counter()
            try:
                self._take_in()
                works = self._scheduler.plan()
                assert works or not self._scheduler.busy, "requests wait, and none of them can run"
                if works:
                    self._work(works)
            except Exception as error:
                self._crash(error)
            self._stats.steps += 1
            self._stats.seconds += time.perf_counter() - began
            return self._scheduler.busy or bool(self._inbox)

    def _take_in(self) -> None:
        with self._lock:
            inbox, self._inbox = self._inbox, []
            withdrawn, self._withdrawn = self._withdrawn, []
        for ticket in inbox:
            self._scheduler.add(ticket.runs[0])  # the others find its prompt read
        for ticket in withdrawn:
            if (handle := self._handles.pop(ticket, None)) is not None:
                self._scheduler.withdraw(ticket.runs)
                ticket.closed = handle.cancelled = True
                self._stats.cancelled += 1
                wake(waiter for waiter in [handle.put((), done=True)] if waiter)

    def _work(self, works: list[Work]) -> None:
        for work in works:
            if not work.run.begun:
                work.run.begun = True
                self._stats.cached_tokens += work.run.computed
                if work.run.writer.index == 0:
                    self._handles[work.run.ticket].cached = work.run.computed
        guessed = [work for work in works if work.guesses]
        before = self._store.copies([work.run for work in guessed]) if guessed else []
        hidden, ends = self._forward(works)
        self._stats.computed_tokens += sum(work.count for work in works)
        for work in works:
            if not work.guesses:
                self._store.advance(work.run, work.count)
        speaking = [(work, end - len(work.guesses)) for work, end in zip(works, ends, strict=True) if work.last]
        self._score_prompts(works, ends, hidden)
        if guessed:
            self._compare(speaking, hidden, before)
        elif speaking:
            rows = hidden if len(speaking) == hidden.shape[0] else hidden[torch.tensor([end for _, end in speaking])]
            self._say([work.run for work, _ in speaking], self.model.logits(rows))

    def _compare(self, speaking: list[tuple[Work, int]], hidden: Tensor, before: list[dict[str, Tensor]]) -> None:
        """Draw tokens of sequences whose first logits come from these rows of hidden [tokens, dim], and more of each
        as long as they are as guessed. States of a sequence of which something was not as guessed are put back; what
        was right is read again with what comes next."""
        places = torch.tensor([first + n for work, first in speaking for n in range(len(work.guesses) + 1)])
        logits = self.model.logits(hidden[places])
        starts = list(itertools.accumulate((len(work.guesses) + 1 for work, _ in speaking), initial=0))
        going, kept = [(work.run, work, start) for (work, _), start in zip(speaking, starts, strict=False)], {}
        for n in itertools.count():
            if not self._store.slots:
                for run, work, _ in going:
                    if work.guesses:
                        self._store.advance(run, 1)
            self._say([run for run, _, _ in going], logits[torch.tensor([start + n for _, _, start in going])])
            right = []
            for run, work, start in going:
                kept[run] = n
                if n < len(work.guesses) and run.line >= 0:
                    self._stats.proposed += 1
                    if run.tokens[-1] == work.guesses[n]:
                        self._stats.kept += 1
                        right.append((run, work, start))
            going = right
            if not going:
                break
        for n, work in enumerate(work for work, _ in speaking if work.guesses):
            run, lookup = work.run, work.run.lookup
            if run.line < 0 or lookup is None:
                continue  # it is finished
            lookup.judge(len(work.guesses), kept[run], len(run.tokens))
            if self._store.slots:
                if kept[run] == len(work.guesses):
                    self._store.advance(run, work.count)
                else:
                    self._store.put_back(run, before, n)

    def _forward(self, works: list[Work]) -> tuple[Tensor, list[int]]:
        """Hidden states [tokens, dim] of the call, and where in it each sequence's last one is."""
        runs, counts = [work.run for work in works], [work.count for work in works]
        state = self._store.bind(runs, counts)
        device = self.model.device
        with self.adapters.rows((run.ticket.adapter, count) for run, count in zip(runs, counts, strict=True)):
            if max(counts) == 1:
                ids = torch.tensor([[run.tokens[run.computed]] for run in runs], device=device)
                hidden = self.model.hidden(ids, state=state).squeeze(1)
            else:
                flat = [t for w in works for t in (*w.run.tokens[w.run.computed :][: w.count], *w.guesses)]
                ids = torch.tensor([flat], device=device)
                hidden = self.model.hidden(ids, bounds=Bounds.of_lengths(tuple(counts)), state=state)[0]
        self._store.commit()
        return hidden, [end - 1 for end in itertools.accumulate(counts)]

    def _say(self, runs: list[Run], logits: Tensor) -> None:
        """Draw the next token of these sequences from logits [runs, vocab], and pass it on."""
        self._sampler.arrange([run.row for run in runs])
        tokens = self._sampler.sample(self._guided(runs, logits))
        chosen, likeliest = self._logprobs(runs, tokens, logits)
        arrived: dict[Ticket, list[Event]] = {}
        for n, (run, token) in enumerate(zip(runs, tokens, strict=True)):
            ticket = run.ticket
            if ticket.closed:
                continue
            if token >= self._sampler.vocab:
                self._fail([ticket], BROKEN if run.guide is None else f"its guide allows no token, or {BROKEN}")
                continue
            run.tokens.append(token)
            if run.guide is not None:
                run.guide.accept(token)
            complete = run.guide is not None and run.guide.finished
            event = run.writer.event(token, chosen.get(n), likeliest.get(n, ()), complete)
            arrived.setdefault(ticket, []).append(event)
            if event.finish is not None:
                self._scheduler.finish(run)
                ticket.unfinished -= 1
            elif run.computed in self._lengths.turns:
                self._scheduler.again(run)
            if len(run.row.answer) == 1 and run.writer.index == 0:
                for sibling in ticket.runs[1:]:
                    self._scheduler.add(sibling)
        self._stats.new_tokens += len(tokens)
        self._deliver(arrived)

    def _guided(self, runs: list[Run], logits: Tensor) -> Tensor:
        """Logits of what is not allowed are -inf."""
        for n, run in enumerate(runs):
            if run.guide is not None and (allowed := run.guide.allowed()) is not None:
                if not any(other.guide is not None for other in runs[:n]):
                    logits = logits.clone()
                logits[n].masked_fill_(~allowed, -math.inf)
        return logits

    def _logprobs(
        self, runs: list[Run], tokens: list[int], logits: Tensor
    ) -> tuple[dict[int, float], dict[int, tuple[Scored, ...]]]:
        """By row: the log-probability of the chosen token, and the likeliest tokens with theirs."""
        chosen: dict[int, float] = {}
        likeliest: dict[int, tuple[Scored, ...]] = {}
        for which in ("model", "sampled"):
            rows = [n for n, run in enumerate(runs) if _wanted(run.ticket.request) == which]
            if not rows:
                continue
            table = self._sampler.log_distribution(logits, rows, which)
            picked = torch.tensor([min(tokens[n], table.shape[1] - 1) for n in rows], device=table.device)
            chosen |= zip(rows, table.gather(1, picked[:, None]).squeeze(1).tolist(), strict=True)
            tops = [runs[n].ticket.request.top for n in rows]
            likeliest |= zip(rows, _top(table, tops), strict=True)
        return chosen, likeliest

    def _score_prompts(self, works: list[Work], ends: list[int], hidden: Tensor) -> None:
        """Log-probabilities of those tokens of prompts that the call's tokens foretell."""
        for work, end in zip(works, ends, strict=True):
            run, ticket = work.run, work.run.ticket
            if not ticket.scoring:
                continue
            first = run.computed - work.count
            foretold = ticket.request.prompt[first + 1 : run.computed + 1]
            skip = len(ticket.scored) - first  # a sequence that begins again has some of them
            if skip < 0 or not foretold[skip:]:
                continue
            start = end + 1 - work.count + skip
            table = self.model.logits(hidden[start : start + len(foretold) - skip]).float().log_softmax(1)
            own = table.gather(1, torch.tensor(foretold[skip:], device=table.device)[:, None]).squeeze(1).tolist()
            tops = _top(table, [ticket.request.prompt_logprobs or 0] * len(own))
            ticket.scored += [((t, p), top) for t, p, top in zip(foretold[skip:], own, tops, strict=True)]

    # -- what becomes of requests ----------------------------------------------------------------------------------

    def _deliver(self, arrived: dict[Ticket, list[Event]]) -> None:
        waiters = []
        for ticket, events in arrived.items():
            if ticket.closed:
                continue
            if ticket.request.candidates > ticket.request.n:
                events = _best(ticket, events)
            done = ticket.unfinished == 0
            if done:
                self._stats.finished += 1
                ticket.closed = True
                with self._lock:
                    handle = self._handles.pop(ticket)
            else:
                handle = self._handles[ticket]
            waiters.append(handle.put(events, done))
        wake(waiter for waiter in waiters if waiter)

    def _fail(self, tickets: list[Ticket], reason: str) -> None:
        for ticket in tickets:
            self._scheduler.withdraw(ticket.runs)
        self._tell(tickets, reason)

    def _tell(self, tickets: list[Ticket], reason: str) -> None:
        """End the requests for those who wait for them."""
        waiters = []
        for ticket in tickets:
            with self._lock:
                handle = self._handles.pop(ticket)
            ticket.closed, handle.error = True, reason
            self._stats.failed += 1
            waiters.append(handle.put((), done=True))
        wake(waiter for waiter in waiters if waiter)

    def _crash(self, error: Exception) -> None:
        """Whoever was running fails (everyone, if nobody was); state is made anew, and who waits starts there."""
        traceback.print_exception(error)
        self._stats.crashes += 1
        ran = {run.ticket for run in self._scheduler.running}
        waiting = [run for run in self._scheduler.queue if run.ticket not in ran] if ran else []
        spared = {run.ticket for run in waiting}
        with self._lock:
            failed = [t for t in self._handles if t not in spared and t not in self._inbox]
        self._stats.preempted += self._scheduler.preempted
        self._store, self._scheduler, self._sampler = self._begin()
        self._fail(failed, f"the engine failed: {type(error).__name__}: {error}")
        for run in waiting:
            self._scheduler.add(run)

    def stats(self) -> Stats:
        """A copy of the figures."""
        pools = [group.pool for group in self._store.groups] or [p for p in [self._store.slot_pool] if p]
        used = max((1 - pool.available / pool.count for pool in pools), default=0.0)
        return replace(
            self._stats, preempted=self._stats.preempted + self._scheduler.preempted, used=used,
            running=len(self._scheduler.running), waiting=self._scheduler.waiting + len(self._inbox),
        )  # fmt: skip


def _wanted(request: Request) -> str | None:
    return "model" if request.logprobs is None and request.candidates > request.n else request.logprobs


def _top(table: Tensor, counts: list[int]) -> list[tuple[Scored, ...]]:
    """The likeliest tokens of each row, by rows' counts."""
    if not any(counts):
        return [()] * len(counts)
    values, ids = table.topk(min(max(counts), table.shape[1]), 1)
    rows = zip(ids.tolist(), values.tolist(), counts, strict=True)
    return [tuple(zip(i[:n], v[:n], strict=True)) for i, v, n in rows]


def _best(ticket: Ticket, events: list[Event]) -> list[Event]:
    """Nothing until all candidates are finished; then the events of the likeliest ones (per token), the best first."""
    for event in events:
        ticket.runs[event.index].events.append(event)
    if ticket.unfinished:
        return []

    def likelihood(run: Run) -> float:
        return sum(event.logprob or 0.0 for event in run.events) / len(run.events)

    best = sorted(ticket.runs, key=likelihood, reverse=True)[: ticket.request.n]
    return [replace(event, index=n) for n, run in enumerate(best) for event in run.events]

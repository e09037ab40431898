"""The engine: one model, many requests, one call of the model a step."""

from __future__ import annotations

import itertools
import math
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ...models.decoder import Decoder
from ...transforms.lora import Adapters, check_rows
from ...weights.tokenizer import Tokenizer
from ..defaults import stop_ids
from ..generate import Answer, Event
from ..generate import request as writer
from ..sampling import BROKEN, Row, Sampler
from ..session import room_after
from .drafters import drafter_of
from .forward import forward
from .handle import Handle, wake
from .lengths import Lengths
from .request import Request, Run, Ticket
from .scheduler import Scheduler, Work
from .scores import best, logprobs, score_prompts
from .stats import Stats
from .store import Store

GUIDE_FAILED = "its guide failed"
AGE = 10.0  # seconds that one level of priority is worth


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
        drafter: Decoder | Literal["lookup", "own"] | None = None,
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
        self.adapters = adapters or Adapters()
        check_rows(model, self.adapters)
        self._lengths = lengths = Lengths.of(model)
        if lengths.plain is not None:
            if drafter is not None:
                raise ValueError("a model whose rotations change with the length of the text cannot speculate")
            if model.cfg.context is None:
                raise ValueError("a model whose rotations change with the length of the text needs a context")
            chunk = max(chunk, model.cfg.context)  # it reads long texts in one call
        interval = -(-interval // block) * block

        sizes = {"max_batch": max_batch, "block": block, "chunk": chunk, "prefixes": prefixes, "interval": interval}

        def begin() -> tuple[Store, Scheduler, Sampler]:
            drafts, rest = drafter_of(drafter, model, memory, **sizes)
            store = Store(model, memory=rest, lengths=lengths, **sizes)  # type: ignore[arg-type]
            scheduler = Scheduler(store, max_batch=max_batch, chunk=chunk, drafter=drafts)
            return store, scheduler, Sampler(vocab=model.cfg.head.vocab)

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
            ticket.runs.append(Run(ticket, writer(self.model, n, prompt, own, room, self.tokenizer), row))
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
        with self._stepping:  # those who wait may make steps of their own as soon as there is no thread
            with self._lock:
                self._thread = None
                self._inbox.clear()  # what came in during the last step
                self._withdrawn.clear()
                tickets = list(self._handles)
            self._fail(tickets, "the engine was stopped")

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
                    self._tell(list(self._handles), f"the engine has ended: {in_short(error)}")
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
        hidden, trunk, ends = self._forward(works)
        self._stats.computed_tokens += sum(work.count for work in works)
        for work, end in zip(works, ends, strict=True):
            if not work.guesses:
                if trunk is not None:
                    self._follow(work.run, hidden, trunk, end + 1 - work.count, work.count)
                self._store.advance(work.run, work.count)
        speaking = [(work, end - len(work.guesses)) for work, end in zip(works, ends, strict=True) if work.last]
        score_prompts(self.model, works, ends, hidden)
        if guessed:
            kept = self._compare(speaking, hidden)
            self._settle([(work, first) for work, first in speaking if work.guesses], kept, hidden, trunk, before)
        elif speaking:
            rows = hidden if len(speaking) == hidden.shape[0] else hidden[torch.tensor([end for _, end in speaking])]
            self._say([work.run for work, _ in speaking], self.model.logits(rows))

    def _compare(self, speaking: list[tuple[Work, int]], hidden: Tensor) -> dict[Run, int]:
        """Draw tokens of sequences whose first logits come from these rows of hidden [tokens, dim], and more of each
        as long as they are as guessed -> how many were."""
        places = torch.tensor([first + n for work, first in speaking for n in range(len(work.guesses) + 1)])
        logits = self.model.logits(hidden[places])
        starts = list(itertools.accumulate((len(work.guesses) + 1 for work, _ in speaking), initial=0))
        going, kept = [(work.run, work, start) for (work, _), start in zip(speaking, starts, strict=False)], {}
        n = 0
        while True:
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
                return kept
            n += 1

    def _settle(
        self, guessed: list[tuple[Work, int]], kept: dict[Run, int], hidden: Tensor, trunk: Tensor | None,
        before: list[dict[str, Tensor]],
    ) -> None:  # fmt: skip
        """After guesses: states of a sequence of which something was not as guessed are put back; what was right is
        read again with what comes next."""
        for n, (work, first) in enumerate(guessed):
            run = work.run
            if run.line < 0:
                continue  # it is finished
            run.pace.judge(len(work.guesses), kept[run], len(run.tokens))
            if self._store.slots and kept[run] < len(work.guesses):
                self._store.put_back(run, before, n)
                continue
            self._follow(run, hidden, trunk, first, kept[run] + 1)
            if self._store.slots:
                self._store.advance(run, work.count)

    def _follow(self, run: Run, hidden: Tensor, trunk: Tensor | None, first: int, count: int) -> None:
        """Tell the drafter what was read and stays."""
        if trunk is not None and self._scheduler.drafter is not None:
            self._scheduler.drafter.read(run, hidden[first : first + count], trunk[first : first + count])

    def _forward(self, works: list[Work]) -> tuple[Tensor, Tensor | None, list[int]]:
        """As `forward`, each sequence by its own adapter."""
        drafter = self._scheduler.drafter
        runs = [work.run for work in works]
        fresh = [(*work.run.tokens[work.run.computed :][: work.count], *work.guesses) for work in works]
        follows = drafter is not None and drafter.follows
        if not self.adapters.names:
            return forward(self.model, self._store, runs, fresh, trunk=follows)
        with self.adapters.rows((work.run.ticket.adapter, work.count) for work in works):
            return forward(self.model, self._store, runs, fresh, trunk=follows)

    def _say(self, runs: list[Run], logits: Tensor) -> None:
        """Draw the next token of these sequences from logits [runs, vocab], and pass it on."""
        self._sampler.arrange([run.row for run in runs])
        tokens = self._sampler.sample(self._guided(runs, logits))
        chosen, likeliest = logprobs(self._sampler, runs, tokens, logits)
        arrived: dict[Ticket, list[Event]] = {}
        vocab, turns = self._sampler.vocab, self._lengths.turns
        try:
            for n, (run, token) in enumerate(zip(runs, tokens, strict=True)):
                ticket = run.ticket
                if ticket.closed:
                    continue
                if token >= vocab:
                    self._fail([ticket], BROKEN if run.guide is None else f"its guide allows no token, or {BROKEN}")
                    continue
                try:
                    if run.guide is not None:
                        run.guide.accept(token)
                except Exception as error:
                    self._fail([ticket], guide_failed(error))
                    continue
                run.tokens.append(token)
                complete = run.guide is not None and run.guide.finished
                event = run.writer.event(token, chosen.get(n), likeliest.get(n, ()), complete)
                arrived.setdefault(ticket, []).append(event)
                if event.finish is not None:
                    self._scheduler.finish(run)
                    ticket.unfinished -= 1
                elif turns and run.computed in turns:
                    self._scheduler.again(run)
                if len(ticket.runs) > 1 and len(run.row.answer) == 1 and run.writer.index == 0:
                    for sibling in ticket.runs[1:]:
                        self._scheduler.add(sibling)
        finally:  # who is finished has its answer, whatever happens to the others
            self._stats.new_tokens += len(tokens)
            self._deliver(arrived)

    def _guided(self, runs: list[Run], logits: Tensor) -> Tensor:
        """Logits of what is not allowed are -inf."""
        for n, run in enumerate(runs):
            if run.guide is None or run.ticket.closed:
                continue
            try:
                allowed = run.guide.allowed()
            except Exception as error:  # of this answer alone: the others go on
                self._fail([run.ticket], guide_failed(error))
                continue
            if allowed is not None:
                if not any(other.guide is not None for other in runs[:n]):
                    logits = logits.clone()
                logits[n].masked_fill_(~allowed, -math.inf)
        return logits

    # -- what becomes of requests ----------------------------------------------------------------------------------

    def _deliver(self, arrived: dict[Ticket, list[Event]]) -> None:
        waiters = []
        for ticket, events in arrived.items():
            if ticket.closed:
                continue
            if ticket.picks:
                events = best(ticket, events)
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
        self._fail(failed, f"the engine failed: {in_short(error)}")
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


def guide_failed(error: Exception) -> str:
    return f"{GUIDE_FAILED}: {in_short(error)}"


def in_short(error: Exception) -> str:
    """What those who wait are told: the first line alone, for an error may quote what somebody else has sent."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"

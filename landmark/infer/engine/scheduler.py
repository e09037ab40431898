"""Who runs next: continuous batching (Orca, Yu et al. 2022) with prompts read in chunks between the others' tokens
(Sarathi, Agrawal et al. 2023), and recomputation for who had to give way (vLLM, Kwon et al. 2023)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..speculative.pace import Cost
from .drafts import Drafter
from .request import Run
from .store import Store


@dataclass(slots=True)
class Work:
    """The next `count` tokens of a sequence; `last` if the one after them is to be drawn. The last of them may be
    `guesses`."""

    run: Run
    count: int
    last: bool
    guesses: Sequence[int] = ()


class Scheduler:
    """Waiting sequences and running ones, in the order of their urgency. `preempted` counts those that gave way."""

    def __init__(self, store: Store, *, max_batch: int, chunk: int, drafter: Drafter | None = None) -> None:
        self.store, self.max_batch, self.chunk, self.drafter = store, max_batch, chunk, drafter
        self._cost = None if drafter is None else Cost.on(store.device, drafter.cost)
        self.running: list[Run] = []
        self._waiting: list[tuple[tuple[float, int, int], Run]] = []
        self.preempted = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def queue(self) -> list[Run]:
        """Those that wait, in no order; they hold nothing."""
        return [run for _, run in self._waiting]

    @property
    def busy(self) -> bool:
        return bool(self.running or self._waiting)

    def add(self, run: Run) -> None:
        heapq.heappush(self._waiting, (run.urgency, run))

    def finish(self, run: Run) -> None:
        """It leaves; what it held is free."""
        self.running.remove(run)
        self._release(run)

    def _release(self, run: Run) -> None:
        self.store.release(run)
        if self.drafter is not None:
            self.drafter.leave(run)

    def again(self, run: Run) -> None:
        """A running sequence is to be read anew, from its first token."""
        self.finish(run)
        self.add(run)

    def withdraw(self, runs: Iterable[Run]) -> None:
        """They leave, wherever they are."""
        gone = set(runs)
        for run in [run for run in self.running if run in gone]:
            self.finish(run)
        if any(run in gone for _, run in self._waiting):
            self._waiting = [entry for entry in self._waiting if entry[1] not in gone]
            heapq.heapify(self._waiting)

    def plan(self) -> list[Work]:
        """The next call of the model: one token of everyone who writes, then as much of prompts as a chunk holds."""
        budget, works = self.chunk, []
        at, apart = 0, False  # whether they are not all alike, so that their order matters
        while at < len(self.running):
            run = self.running[at]
            at += 1
            length = len(run.tokens)
            count = pending = length - run.computed
            if pending > 1:
                count = self.store.stop_before(run, min(pending, budget))
                if count == 0:
                    continue
            end = run.computed + count
            if end > run.covered and not self._make_room(run, end):
                continue
            if pending > 1:
                budget -= count
            apart = apart or pending > 1 or run.ticket.adapter >= 0
            works.append(Work(run, count, end == length))
        works = self._guessed(works)
        admitted = self._admit(budget)
        if apart or admitted or self.drafter is not None:
            works += admitted
            works.sort(key=lambda work: (work.count > 1, work.run.ticket.adapter))
        return works

    def _guessed(self, works: list[Work]) -> list[Work]:
        """The same with what is worth reading after sequences' last tokens; nobody gives way for it."""
        if self.drafter is None or self._cost is None:
            return works
        asked: dict[int, int] = {}
        needed = self._cost.needed(max(1, len(works)))
        for n, work in enumerate(works):
            run = work.run
            if run.pending == 1:
                most = min(run.pace.ahead(len(run.tokens), needed), self.chunk - 1, run.writer.room - 1)
                most = min(most, self.store.stop_before(run, 1 + most) - 1)
                if most > 0:
                    asked[n] = most
        if not asked:
            return works
        for n, guesses in zip(
            asked, self.drafter.guess([(works[n].run, most) for n, most in asked.items()]), strict=True
        ):
            run = works[n].run
            if guesses and self.store.reserve(run, len(run.tokens) + len(guesses)):
                works[n] = replace(works[n], count=1 + len(guesses), guesses=guesses)
        return works

    def _make_room(self, run: Run, length: int) -> bool:
        """Blocks for `length` tokens of a running sequence; the least urgent ones give theirs, itself if it is one."""
        while not self.store.reserve(run, length):
            last = self.running.pop()
            self._release(last)
            self.add(last)
            self.preempted += 1
            if last is run:
                return False
        return True

    def _admit(self, budget: int) -> list[Work]:
        works = []
        while self._waiting and budget > 0 and len(self.running) < self.max_batch:
            run = self._waiting[0][1]
            if (self.store.lengths.whole(run) or 0) > budget or not self.store.admit(run):
                break
            heapq.heappop(self._waiting)
            self.running.append(run)
            self.running.sort(key=lambda each: each.urgency)
            count = self.store.stop_before(run, min(run.pending, budget))
            fits = self.store.reserve(run, run.computed + count)
            assert fits, "a sequence was admitted without room for its prompt"
            budget -= count
            works.append(Work(run, count, run.computed + count == len(run.tokens)))
        return works

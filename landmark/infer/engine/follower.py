"""A draft model in the engine (Leviathan et al. 2023): it reads the answers along, in a store of its own, and goes on
with each of them alone, all that are to be guessed ahead in one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...models.decoder import Decoder
from ..sampling import Sampler
from ..speculative.cost import draft_cost
from .drafts import rehearsal
from .forward import forward
from .lengths import Lengths
from .request import Held, Run
from .store import Store


class Follower(Held):
    """An answer as the draft model has it. What it read of guesses, `ahead`, is in the state after what is `computed`,
    and stays there if it turns out right."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.ticket, run.tokens)
        self.ahead: list[int] = []


class ModelDrafts:
    """Guesses of a smaller model with the same vocabulary. Raises ValueError for one that cannot follow the texts."""

    follows = False

    def __init__(self, draft: Decoder, model: Decoder, **options: int | bool) -> None:
        own, its = draft.cfg.head.vocab, model.cfg.head.vocab
        if own != its:
            raise ValueError(
                f"the drafting model has a vocabulary of {own}, the model one of {its}; they must be equal"
            )
        if draft.training:
            raise ValueError("the drafting model is in training mode; call eval() before it drafts")
        lengths = Lengths.of(draft)
        if lengths.plain is not None:
            raise ValueError("a drafting model's rotations must not change with the length of the text")
        self.model, self.chunk = draft, int(options["chunk"])
        self.store = Store(draft, lengths=lengths, **options)  # type: ignore[arg-type]
        self.sampler = Sampler(vocab=own)
        self.cost = draft_cost(draft, model)
        self._followers: dict[Run, Follower] = {}

    def guess(self, asked: Sequence[tuple[Run, int]]) -> list[list[int]]:
        longest = min(self.model.cfg.context or math.inf, self.store.capacity)
        ready = [(run, int(min(most, longest - len(run.tokens)))) for run, most in asked]
        said = self._go_on({run: most for run, most in ready if most > 0 and self._follow(run)})
        return [said.get(run, []) for run, _ in asked]

    def read(self, run: Run, hidden: Tensor, trunk: Tensor) -> None:
        """It reads the tokens themselves."""

    def leave(self, run: Run) -> None:
        if (follower := self._followers.pop(run, None)) is not None:
            self.store.release(follower)

    def _follow(self, run: Run) -> bool:
        """Whether there is a state for a text; what of it was guessed right is known by now."""
        if run in self._followers:
            follower = self._followers[run]
            new = follower.tokens[follower.computed : -1]  # what comes after the last one is wanted, so that is read
            right = 0
            while right < min(len(new), len(follower.ahead)) and new[right] == follower.ahead[right]:
                right += 1
            if right:
                self.store.advance(follower, right)
            follower.ahead = []
            return True
        follower = Follower(run)
        if not self.store.admit(follower):
            return False
        self._followers[run] = follower
        return True

    def _go_on(self, wanted: Mapping[Run, int]) -> dict[Run, list[int]]:
        """What the model says after each text, so many tokens; nothing where it has yet to read on."""
        logits = self._catch_up(list(wanted))
        runs = list(logits)
        if not runs:
            return {}
        followers = [self._followers[run] for run in runs]
        before = self.store.copies(followers) if self.store.slots else []
        rows = {run: rehearsal(run) for run in runs}
        said: dict[Run, list[int]] = {run: [] for run in runs}
        going, last = runs, torch.stack([self._allowed(run, logits[run]) for run in runs])
        while going:
            self.sampler.arrange([rows[run] for run in going])
            for run, token in zip(going, self.sampler.sample(last), strict=True):
                if token < self.sampler.vocab:
                    said[run].append(token)
                else:  # its logits are not numbers
                    wanted = {**wanted, run: 0}
            going = [run for run in going if len(said[run]) < wanted[run] and self._room(run, len(said[run]))]
            if going:
                last = self._read_ahead(going, said)
        for n, (run, follower) in enumerate(zip(runs, followers, strict=True)):
            if before:
                self.store.put_back(follower, before, n)
            else:
                follower.ahead = said[run][:-1]
        return said

    def _allowed(self, run: Run, logits: Tensor) -> Tensor:
        """What a guide forbids need not be guessed."""
        allowed = None if run.guide is None else run.guide.allowed()
        return logits if allowed is None else logits.masked_fill(~allowed, -math.inf)

    def _room(self, run: Run, guessed: int) -> bool:
        return self.store.reserve(self._followers[run], len(run.tokens) + guessed)

    def _catch_up(self, runs: Sequence[Run]) -> dict[Run, Tensor]:
        """Read of the texts what is not read yet, a chunk in all -> logits [vocab] of what follows those that are."""
        budget = self.chunk
        logits: dict[Run, Tensor] = {}
        behind = list(runs)
        while behind and budget > 0:
            works: list[tuple[Run, Follower, int]] = []
            for run in behind:
                follower = self._followers[run]
                count = self.store.stop_before(follower, min(follower.pending, budget))
                if count and self.store.reserve(follower, follower.computed + count):
                    budget -= count
                    works.append((run, follower, count))
            if not works:
                break
            texts = [follower for _, follower, _ in works]
            fresh = [follower.tokens[follower.computed :][:count] for _, follower, count in works]
            hidden, _, ends = forward(self.model, self.store, texts, fresh)
            for _, follower, count in works:
                self.store.advance(follower, count)
            done = [(run, end) for (run, follower, _), end in zip(works, ends, strict=True) if not follower.pending]
            if done:
                rows = self.model.logits(hidden[torch.tensor([end for _, end in done])])
                logits |= {run: row for (run, _), row in zip(done, rows, strict=True)}
            behind = [run for run, follower, _ in works if follower.pending]
        return logits

    def _read_ahead(self, runs: Sequence[Run], said: Mapping[Run, Sequence[int]]) -> Tensor:
        """Logits [runs, vocab] after the last guess for each text."""
        followers = [self._followers[run] for run in runs]
        certain = [follower.computed for follower in followers]
        for run, follower in zip(runs, followers, strict=True):
            follower.computed += len(said[run]) - 1
        hidden, _, _ = forward(self.model, self.store, followers, [[said[run][-1]] for run in runs])
        for follower, computed in zip(followers, certain, strict=True):
            follower.computed = computed
        return self.model.logits(hidden)

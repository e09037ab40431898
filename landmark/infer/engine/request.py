"""What is asked of the engine, and what it keeps of it while it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..generate import Event
from ..generate import Request as Writer
from ..sampling import Logprobs, Row, Sampling
from ..speculative.pace import Pace
from .radix import Node

MOST = 128  # answers to one request
Scored = tuple[int, float]  # a token and its log-probability


class Guide(Protocol):
    """What may come next in an answer that has to keep to a form. One is made for each answer; what it raises fails the
    request, and nobody else's."""

    def allowed(self) -> Tensor | None:
        """[vocab], bool: what may come now; None: anything."""

    def accept(self, token: int) -> None:
        """The token was taken."""

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, so that it ends here."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how it is to be answered.

    `n` answers, the best of `best_of` by mean log-probability, with seeds that count up from the sampling's. `logprobs`
    gives natural logarithms of the chosen tokens' probabilities ("model": the model's own; "sampled": of the
    distribution that was drawn from) and of the `top` likeliest tokens'; `prompt_logprobs` so many likeliest (0: none)
    for every token of the prompt, and its own. More urgent requests have a higher `priority`: one level goes before
    what came up to `Engine.patience` seconds earlier. `adapter` names one of those that the model has.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    best_of: int | None = None
    priority: int = 0
    logprobs: Logprobs | None = None
    top: int = 0
    prompt_logprobs: int | None = None
    guide: Callable[[], Guide] | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is {self.n}; ask for at least 1 answer")
        if self.candidates > MOST:
            raise ValueError(f"{self.candidates} answers to one prompt are too many; ask for at most {MOST}")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of is {self.best_of}, fewer than the n = {self.n} answers that are wanted")
        if self.top < 0 or (self.top and self.logprobs is None):
            raise ValueError(f"top is {self.top}; it is a count of at least 0, and needs logprobs")
        if self.prompt_logprobs is not None and self.prompt_logprobs < 0:
            raise ValueError(f"prompt_logprobs is {self.prompt_logprobs}; it is a count of at least 0")

    @property
    def candidates(self) -> int:
        return self.n if self.best_of is None else self.best_of


class Ticket:
    """A request that was taken in: what its answers share. `key` is its place in the queue, `adapter` a number (-1: the
    model itself)."""

    def __init__(self, request: Request, key: tuple[float, int], adapter: int = -1) -> None:
        self.request, self.key, self.adapter = request, key, adapter
        self.runs: list[Run] = []
        self.unfinished = request.candidates
        self.closed = False  # nobody waits for it any more
        self.scored: list[tuple[Scored, tuple[Scored, ...]]] = []  # log-probabilities of the prompt's tokens
        self.scoring = request.prompt_logprobs is not None and len(request.prompt) > 1  # these are yet to be computed
        self.picks = request.candidates > request.n  # only the best answers are wanted
        self.logprobs = "model" if request.logprobs is None and self.picks else request.logprobs


class Held:
    """A text, and what a store holds for it.

    `tokens`, of which `computed` are in the state. `tables` are its blocks, a list a group of layers, without the first
    `gone` of them; `line` is where they stand in the store's tables; `slot` is where its state a sequence is. `node` is
    what the prefix tree knows of its first `depth` blocks.
    """

    def __init__(self, ticket: Ticket, tokens: list[int]) -> None:
        self.ticket, self.tokens = ticket, tokens
        self.computed = 0
        self.line = self.slot = -1
        self.tables: list[list[int]] = []
        self.gone: list[int] = []
        self.covered = 0  # tokens that the blocks have room for
        self.node: Node | None = None
        self.depth = 0
        self.branch = 0  # where other texts leave this one: a place to keep a state

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


class Run(Held):
    """One answer in the making: the prompt and what was said; `pace` tells how far it is guessed ahead."""

    def __init__(self, ticket: Ticket, writer: Writer, row: Row) -> None:
        super().__init__(ticket, list(ticket.request.prompt))
        self.writer, self.row, self.pace = writer, row, Pace()
        self.guide = None if ticket.request.guide is None else ticket.request.guide()
        self.events: list[Event] = []  # held back until the best answers are known
        self.urgency = (*ticket.key, writer.index)  # smaller goes first
        self.begun = False  # it has been taken up once

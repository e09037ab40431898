"""How far an answer is guessed ahead: as far as the guesses are likely to be worth what they cost.

The costs are modelled, not measured, so that what is done depends on the requests and not on the clock. A call
of the model reads its weights once, however many tokens it is given, and computes for each of them: its cost is taken
to be 1 + tokens / balance, with the balance of arithmetic and memory of the device. So where one sequence runs, a guess
costs a fraction of what it may save; where many do, a token costs hardly more than its arithmetic, which a guess costs
just as well, and speculation ends by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MOST = 8  # tokens that are guessed at once
PAUSE = 64  # the longest time without guesses, in tokens
BALANCE = {"cpu": 8.0, "cuda": 128.0}  # tokens that take as long to compute as weights to be read
FIRST, RATE = 0.7, 0.1  # the share of guesses that is taken to be right at first, and how fast one learns


@dataclass(frozen=True)
class Cost:
    """`guess`: what the call that makes a guess takes, relative to a call of the model."""

    guess: float = 0.0
    balance: float = BALANCE["cpu"]

    @classmethod
    def on(cls, device: torch.device, guess: float) -> Cost:
        return cls(guess, BALANCE.get(device.type, BALANCE["cuda"]))

    def needed(self, running: int) -> float:
        """How likely a guess has to be right to be worth its cost, where so many sequences run."""
        token = (1 + running / self.balance) / running  # what a token costs without guesses
        return (1 / self.balance + self.guess * token) / token


class Pace:
    """What is known of the guesses for one answer, or for several that are guessed together."""

    def __init__(self) -> None:
        self.rate = FIRST  # of those that were compared, the share that was right, the latest ones most
        self._pause, self._until = 1, 0

    def ahead(self, length: int, needed: float) -> int:
        """How many tokens to guess after a text of so many, each of which has to be right with a probability."""
        if length < self._until:
            return 0
        count, likely = 0, self.rate
        while count < MOST and likely > needed:
            count, likely = count + 1, likely * self.rate
        return max(count, int(needed < FIRST))  # now and then one guess, to see whether they have become better

    def judge(self, guesses: int, right: int, length: int) -> None:
        """So many of the last guesses were right, in what is now a text of so many tokens."""
        for n in range(min(right + 1, guesses)):
            self.rate += RATE * (float(n < right) - self.rate)
        if right:
            self._pause = 1
        else:
            self._until, self._pause = length + self._pause, min(PAUSE, 2 * self._pause)

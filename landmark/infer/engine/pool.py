"""Things of one size that are handed out by number: blocks of tokens, and slots of sequences."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol


class Owner(Protocol):
    def forget(self, pool: Pool, number: int) -> None:
        """The thing is taken: do not find it again."""


class Pool:
    """Each thing is free, or held by some sequences, or idle: held by none, but its owner may still find it.

    Idle ones are taken when nothing is free, the one that was held longest ago first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.owners: list[Owner | None] = [None] * count
        self._holders = [0] * count
        self._free = list(range(count))[::-1]
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        return len(self._idle)

    def take(self) -> int:
        """One that nobody else has. There must be an available one."""
        if not self._free:
            number = next(iter(self._idle))
            owner = self.owners[number]
            assert owner is not None
            owner.forget(self, number)
        number = self._free.pop()
        self._holders[number] = 1
        return number

    def hold(self, number: int) -> None:
        """One more holder."""
        if self._holders[number] == 0:
            del self._idle[number]
        self._holders[number] += 1

    def release(self, number: int) -> None:
        """One holder less."""
        self._holders[number] -= 1
        if self._holders[number] == 0:
            if self.owners[number] is None:
                self._free.append(number)
            else:
                self._idle[number] = None

    def own(self, number: int, owner: Owner) -> None:
        assert self.owners[number] is None
        self.owners[number] = owner

    def disown(self, number: int) -> None:
        """Its owner will not find it again."""
        self.owners[number] = None
        if self._idle.pop(number, 0) is None:
            self._free.append(number)

    def touch(self, number: int) -> None:
        """It was of use now, if it is idle."""
        if number in self._idle:
            self._idle.move_to_end(number)

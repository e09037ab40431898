"""What the engine reads ahead of an answer: prompt lookup (Saxena 2023), as far as it has proved right.

The model reads a token that was drawn, and after it tokens that are only guessed, in one call. As long as the token
that the request draws with its own random number is the guess, the next one can be drawn from the same call. So an
answer is what it is without guesses, whatever its settings.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST = 8  # tokens that are guessed at once
LONGEST, SHORTEST = 3, 2  # what has to stand there a second time
PAUSE = 64  # the longest time without guesses, in tokens


class Lookup:
    """Guesses for one answer: what followed its last tokens where they stood before, in the prompt or the answer."""

    def __init__(self) -> None:
        self.length = 4  # of the next guess, at most
        self._at: dict[tuple[int, ...], int] = {}  # what came last after these tokens, as a place
        self._known = 0  # tokens that were looked at
        self._pause, self._until = 1, 0

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens to follow a text, which only ever grows; none where it does not repeat itself."""
        for end in range(self._known, len(tokens)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._at[tuple(tokens[end - size : end])] = end
        self._known = len(tokens)
        most = min(most, self.length)
        if most < 1 or len(tokens) < self._until:
            return []
        for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            start = self._at.get(tuple(tokens[len(tokens) - size :]))
            if start is not None:
                period = len(tokens) - start  # what goes beyond the text's end goes round
                return [tokens[start + n % period] for n in range(most)]
        return []

    def judge(self, proposed: int, kept: int, length: int) -> None:
        """How many of the last guess were right, in what is now a text of so many tokens."""
        if kept:
            self.length = min(MOST, 2 * self.length) if kept == proposed else kept
            self._pause = 1
        else:
            self.length, self._until = 1, length + self._pause
            self._pause = min(PAUSE, 2 * self._pause)

"""Text that arrives token by token, and ends at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from ..weights.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into pieces of text. Together they are the answer's text up to (and without) a stop string.

    What could be the beginning of a stop string is held back until the next tokens say.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self._decoder, self._stop = tokenizer.stream(prompt), stop
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain after one more token; `stopped` says whether a stop string is complete."""
        return self._pass_on(self._decoder.step(token), last=False)

    def finish(self) -> str:
        """The rest, when no token follows."""
        return self._pass_on(self._decoder.flush(), last=True)

    def _pass_on(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = 0 if last else max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`, without completing it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

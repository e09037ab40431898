"""Penalties on what was read and said before: only the logits of those tokens are touched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def repeat_penalty(logits: Tensor, penalty: Tensor) -> Tensor:
    """Logits of tokens that were read or said, divided by the penalty if positive, otherwise multiplied by it."""
    return torch.where(logits < 0, logits * penalty, logits / penalty)


def count_penalty(logits: Tensor, counts: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """`counts` of the tokens in the answer."""
    return logits - (counts > 0) * presence - counts * frequency


class History:
    """The different tokens of one request: `ids`, and how often the answer has them, `counts`."""

    def __init__(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        known = list(dict.fromkeys(prompt))
        self.place = {token: n for n, token in enumerate(known)}
        self.ids = np.array(known + [0] * 64)
        self.counts = np.zeros(len(self.ids), np.float32)
        for token in answer:
            self.add(token)

    def __len__(self) -> int:
        return len(self.place)

    def add(self, token: int) -> int:
        """One more token of the answer; where it stands."""
        at = self.place.setdefault(token, len(self.place))
        if at == len(self.ids):
            self.ids, self.counts = np.append(self.ids, self.ids), np.append(self.counts, np.zeros_like(self.counts))
        self.ids[at] = token
        self.counts[at] += 1
        return at


class Histories:
    """Those of some rows of a batch, as one table; it is made anew when it becomes too narrow."""

    def __init__(self, rows: Sequence[int], histories: Sequence[History], penalties: Sequence[Sequence[float]]) -> None:
        """`rows` of the batch have these histories and penalties (repetition, presence, frequency)."""
        self._rows, self._histories = list(rows), list(histories)
        self._penalties = torch.tensor(penalties).T[:, :, None]
        self._widen()

    def _widen(self) -> None:
        self._width = max(map(len, self._histories)) + 64
        self._ids = np.empty((len(self._rows), self._width), np.int64)
        self._counts = np.zeros((len(self._rows), self._width), np.float32)
        for n, history in enumerate(self._histories):
            count = len(history)
            self._ids[n, :count], self._counts[n, :count] = history.ids[:count], history.counts[:count]
            self._ids[n, count:] = history.ids[0]  # what is said of the first token is said again

    def add(self, tokens: Sequence[int]) -> None:
        """The next token of every row of the batch."""
        for n, (row, history) in enumerate(zip(self._rows, self._histories, strict=True)):
            at = history.add(tokens[row])
            if at >= self._width:
                return self._add_rest(n + 1, tokens)
            self._ids[n, at], self._counts[n, at] = tokens[row], history.counts[at]
        return None

    def _add_rest(self, first: int, tokens: Sequence[int]) -> None:
        for row, history in zip(self._rows[first:], self._histories[first:], strict=True):
            history.add(tokens[row])
        self._widen()

    def penalise(self, logits: Tensor) -> None:
        """Change logits [B, vocab] in place."""
        width = max(map(len, self._histories))
        device = logits.device
        ids, counts = (torch.from_numpy(x[:, :width]).to(device) for x in (self._ids, self._counts))
        repetition, presence, frequency = self._penalties.to(device)
        rows = torch.tensor(self._rows, device=device)[:, None]
        x = count_penalty(repeat_penalty(logits[rows, ids], repetition), counts, presence, frequency)
        lengths = torch.tensor([len(history) for history in self._histories], device=device)[:, None]
        logits[rows, ids] = torch.where(torch.arange(width, device=device) < lengths, x, x[:, :1])

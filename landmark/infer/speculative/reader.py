"""Models that read ahead, and forget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ctx import Bounds
from ...models.decoder import Decoder
from ...nn.cache import KVCache
from ..session import turning_lengths


class Reader:
    """A decoder that reads sequences and can forget what it read last, whatever kinds of state it has.

    Keys and values of tokens that are taken back are simply overwritten. Other states are put back as they were before
    the last call, and what is kept of that call is read again.
    """

    def __init__(self, model: Decoder, slots: int, capacity: int) -> None:
        if turning_lengths(model):
            raise ValueError("a model whose rotations change with the length of the text (LongRoPE) cannot speculate")
        self.model, self.state = model, model.new_state(slots, capacity)
        self.texts: list[list[int]] = [[] for _ in range(slots)]
        self._plain = all(isinstance(leaf, KVCache) for leaf in self.state.leaves())
        self._before: Any = None
        self._read: list[list[int]] = [[] for _ in range(slots)]
        self.follow = False  # whether to keep for `take` what the model made of the tokens
        self._seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(slots)]

    def read(self, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """Append at least one token to every sequence -> logits [tokens, vocab] after each of them."""
        self._before = None if self._plain else (self.state.snapshot(), [list(text) for text in self.texts])
        self._read = [list(new) for new in tokens]
        lengths = [len(new) for new in tokens]
        device = self.model.device
        if len(set(lengths)) == 1:
            ids, bounds = torch.tensor(self._read, device=device), None
        else:
            ids = torch.tensor([[token for new in tokens for token in new]], device=device)
            bounds = Bounds.of_lengths(tuple(lengths))
        if self.follow:
            hidden, trunk = self.model.hidden_and_trunk(ids, bounds=bounds, state=self.state)
            parts = (x.flatten(0, 1).split(lengths) for x in (hidden, trunk))
            for seen, pair in zip(self._seen, zip(*parts, strict=True), strict=True):
                seen.append(pair)
        else:
            hidden = self.model.hidden(ids, bounds=bounds, state=self.state)
        for text, new in zip(self.texts, tokens, strict=True):
            text += new
        return list(self.model.logits(hidden.flatten(0, 1)).split(lengths))

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states and what the last layer read, [n, dim] each for every sequence, of the tokens that were read
        and kept since the last time."""
        pairs = [[torch.cat(x) for x in zip(*seen, strict=True)] for seen in self._seen]
        self._seen = [[] for _ in pairs]
        return [hidden for hidden, _ in pairs], [trunk for _, trunk in pairs]

    def keep(self, counts: Sequence[int]) -> None:
        """Of the last call's tokens keep so many of each sequence, at least one."""
        if all(count == len(new) for count, new in zip(counts, self._read, strict=True)):
            return
        if self._plain:
            for i, (count, new) in enumerate(zip(counts, self._read, strict=True)):
                self.state.lengths[i] -= len(new) - count
                del self.texts[i][len(self.texts[i]) - len(new) + count :]
                if self.follow:
                    hidden, trunk = self._seen[i].pop()
                    self._seen[i].append((hidden[:count], trunk[:count]))
            return
        for seen in self._seen if self.follow else ():
            seen.pop()
        snapshot, self.texts = self._before
        self.state.restore(snapshot)
        self.read([new[:count] for count, new in zip(counts, self._read, strict=True)])

    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences, in this order."""
        self.state.select(list(rows))
        self.texts = [self.texts[row] for row in rows]
        self._read = [self._read[row] for row in rows]
        self._seen = [self._seen[row] for row in rows]

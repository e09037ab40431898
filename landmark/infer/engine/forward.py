"""One call of a model for sequences that a store holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...ctx import Bounds
from ...models.decoder import Decoder
from .request import Held
from .store import Store


def forward(
    model: Decoder, store: Store, texts: Sequence[Held], fresh: Sequence[Sequence[int]], trunk: bool = False
) -> tuple[Tensor, Tensor | None, list[int]]:
    """Read `fresh` tokens after what is computed of each text -> hidden states [tokens, dim], what the last layer read
    (with `trunk`), and where in them each text's last one is."""
    counts = [len(new) for new in fresh]
    state = store.bind(texts, counts)
    if max(counts) == 1:
        ids, bounds = torch.tensor(fresh, device=store.device), None
    else:
        ids = torch.tensor([[token for new in fresh for token in new]], device=store.device)
        bounds = Bounds.of_lengths(tuple(counts))
    read = None
    if trunk:
        hidden, read = model.hidden_and_trunk(ids, bounds=bounds, state=state)
        read = read.flatten(0, 1)
    else:
        hidden = model.hidden(ids, bounds=bounds, state=state)
    store.commit()
    return hidden.flatten(0, 1), read, [end - 1 for end in itertools.accumulate(counts)]

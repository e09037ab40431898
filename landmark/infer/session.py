"""The seam between models and whatever drives them: sequences that a model extends, all of them at each call.

Sampling and beam search sit on this class; an engine that admits and evicts requests at every step puts its own states
under the same two calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ctx import Bounds, Memory
from ..models.decoder import Decoder
from ..models.encoder_decoder import EncoderDecoder
from ..nn.attention import Attention
from ..nn.rope_scaling import LongRoPE


class Session:
    """A decoder and the state of `slots` sequences of up to `capacity` tokens, which may look at an encoded source.

    Where a sequence grows past a length at which all its rotations change (LongRoPE), it is read again.
    """

    def __init__(self, model: Decoder, slots: int, capacity: int, memory: Memory | None = None) -> None:
        self.model, self._memory, self._capacity = model, memory, capacity
        self.state = model.new_state(slots, capacity)
        self._turns = turning_lengths(model)
        self._tokens: list[list[int]] = [[] for _ in range(slots)]  # kept for models that turn

    @torch.inference_mode()
    def extend(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append one or more tokens to every sequence -> logits [slots, vocab] of what comes next.

        Sequences of different lengths lie end to end in one row, and only their last positions reach the head.
        """
        if self._turns:
            tokens = self._turn(tokens)
        lengths = tuple(len(new) for new in tokens)
        device = self.model.device
        memory, self._memory = self._memory, None  # the state keeps what it needs of it
        if len(set(lengths)) == 1:
            ids = torch.tensor(tokens, device=device)
            hidden = self.model.hidden(ids, state=self.state, memory=memory)[:, -1]
        else:
            bounds = Bounds.of_lengths(lengths)
            ids = torch.tensor([[token for new in tokens for token in new]], device=device)
            ends = torch.tensor([start + n - 1 for start, n in bounds.sequences], device=device)
            hidden = self.model.hidden(ids, bounds=bounds, state=self.state, memory=memory)[0, ends]
        return self.model.logits(hidden)

    def _turn(self, tokens: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """`tokens`, or all that was ever read, for an empty state, where a sequence passes a turning length."""
        pasts = [len(old) for old in self._tokens]
        self._tokens = [[*old, *new] for old, new in zip(self._tokens, tokens, strict=True)]
        grown = zip(pasts, self._tokens, strict=True)
        if not any(0 < past <= turn < len(now) for past, now in grown for turn in self._turns):
            return tokens
        self.state = self.model.new_state(len(self._tokens), self._capacity)
        return self._tokens

    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences, in this order; one may be taken several times."""
        if list(rows) != list(range(len(self._tokens))):
            self.state.select(list(rows))
            self._tokens = [self._tokens[row] for row in rows]

    def snapshot(self) -> Any:
        """Enough to come back to this moment, as long as no sequence is selected away."""
        return self.state, self.state.snapshot(), list(self._tokens)

    def restore(self, snapshot: Any) -> None:
        """Come back to the moment of the snapshot."""
        self.state, held, tokens = snapshot
        self.state.restore(held)
        self._tokens = list(tokens)


def turning_lengths(model: Decoder) -> set[int]:
    """Lengths beyond which a sequence's rotations are others from its first token on."""
    ropes = [module.rope for module in model.modules() if isinstance(module, Attention) and module.rope is not None]
    return {rope.cfg.scaling.original for rope in ropes if isinstance(rope.cfg.scaling, LongRoPE)}


@torch.inference_mode()
def begin(
    model: Decoder | EncoderDecoder, prompts: Sequence[Sequence[int]], room: Sequence[int]
) -> tuple[Session, Tensor]:
    """A session that has read `prompts`, each with room for an answer, and the logits [prompts, vocab] of what follows.

    An encoder-decoder's prompts are sources; its answers begin after its start token.
    """
    if isinstance(model, EncoderDecoder):
        memory = model.encode_each([list(prompt) for prompt in prompts])
        session = Session(model.decoder, len(prompts), max(room), memory)
        return session, session.extend([[model.cfg.start]] * len(prompts))
    capacity = max(len(prompt) + n - 1 for prompt, n in zip(prompts, room, strict=True))
    session = Session(model, len(prompts), capacity)
    return session, session.extend(prompts)


def room_after(model: Decoder | EncoderDecoder, prompts: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[int]:
    """How many of the `wanted` tokens fit the context after each prompt (the last one is not read back).

    Raises ValueError for a prompt that is empty, longer than the context, or not of the model's vocabulary, and for a
    model in training mode, whose dropout would have its say.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before it generates")
    reader, writer = (model.encoder, model.decoder) if isinstance(model, EncoderDecoder) else (model, model)
    context, vocab = reader.cfg.context, reader.cfg.embed.vocab
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; give at least one token, such as the one that begins a text")
        if context is not None and len(prompt) > context:
            raise ValueError(f"prompt {number} has {len(prompt)} tokens, longer than the model's context of {context}")
        if bad := [token for token in prompt if not 0 <= token < vocab]:
            raise ValueError(f"prompt {number} holds the id {bad[0]}, but the model's vocabulary ends at {vocab - 1}")
    if writer.cfg.context is None:
        return list(wanted)
    read = [1 if writer is not model else len(prompt) for prompt in prompts]
    return [min(n, writer.cfg.context - r + 1) for n, r in zip(wanted, read, strict=True)]

"""The encoder-decoder: a target is written token by token by a decoder that looks at an encoded source."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config import ModelConfig, at_least
from ..ctx import Bounds, Memory, State
from ..ops.loss import CrossEntropy
from .backbone import Backbone
from .base import Init, Model, materialise
from .decoder import Decoder


class EncoderDecoder(Model):
    """Source ids [B, S] and target ids [B, T] to logits [B, T, vocab].

    Segments [B, S] and [B, T] (default: one sequence a row) number the sequences of each side: 0 is padding, which
    nothing sees, and every run of another number is a sequence. Sequence i of the target sees sequence i of the source.
    The decoder's layers hold a `CrossAttention`, and `shared` embeddings are one table for source and target.
    """

    class Config(ModelConfig):
        encoder: Backbone.Config
        decoder: Decoder.Config
        shared: bool = True
        start: int = at_least(0, default=0)  # the id before the first one of every target
        init: Init = Init()

        def check(self) -> None:
            super().check()
            if self.shared and self.encoder.embed != self.decoder.embed:
                raise ValueError("EncoderDecoder.shared is true, but the embeddings of encoder and decoder differ")

        def build(self) -> EncoderDecoder:
            return materialise(lambda: EncoderDecoder(self), self.init)

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg: EncoderDecoder.Config = cfg
        self.encoder, self.decoder = cfg.encoder.build(), cfg.decoder.build()
        if cfg.shared:
            # The encoder uses the decoder's embedding but does not register it: one tensor, one name.
            del self.encoder.embed
            object.__setattr__(self.encoder, "embed", self.decoder.embed)

    def forward(
        self, source: Tensor, target: Tensor, *, source_segments: Tensor | None = None,
        target_segments: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [B, T, vocab] of source ids [B, S] and target ids [B, T], whose first is `cfg.start`."""
        return self.logits(
            self.hidden(source, target, source_segments=source_segments, target_segments=target_segments)
        )

    def hidden(
        self, source: Tensor, target: Tensor, *, source_segments: Tensor | None = None,
        target_segments: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The decoder's hidden states [B, T, dim]. Raises ValueError if the sides do not hold the same sequences."""
        memory = self.encode(source, segments=source_segments)
        bounds = _bounds(target, target_segments)
        here, there = len(memory.bounds.sequences), len(bounds.sequences)
        if here != there:
            raise ValueError(f"{here} source sequences cannot be paired with {there} target sequences")
        return self.decoder.hidden(target, bounds=bounds, memory=memory)

    def encode(self, source: Tensor, *, segments: Tensor | None = None) -> Memory:
        """Encoded sources, for `decoder.hidden(target, memory=...)`."""
        bounds = _bounds(source, segments)
        return Memory(self.encoder.hidden(source, bounds=bounds), bounds)

    def encode_each(self, sources: list[list[int]]) -> Memory:
        """Encoded sources of any lengths, one a row: no padding is computed, and rows can be selected."""
        lengths = tuple(len(source) for source in sources)
        flat = torch.tensor([token for source in sources for token in source], device=self.device)
        hidden = self.encoder.hidden(flat[None], bounds=Bounds.of_lengths(lengths))
        rows = pad_sequence(list(hidden[0].split(lengths)), batch_first=True)
        return Memory(rows, Bounds.padded(lengths, max(lengths)))

    def new_state(
        self, slots: int, capacity: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> State:
        """The decoder's state for `slots` targets of up to `capacity` tokens; its first call takes the memory."""
        return self.decoder.new_state(slots, capacity, dtype, device)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., vocab]."""
        return self.decoder.logits(hidden)

    def loss(self, hidden: Tensor, targets: Tensor, **options: float) -> CrossEntropy:
        """Cross-entropy of hidden [B, T, dim] with targets [B, T] (-100: none); options as in `Head.loss`."""
        return self.decoder.loss(hidden, targets, **options)

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log p of targets [B, T] (0 where -100)."""
        return self.decoder.logprobs(hidden, targets)


def _bounds(tokens: Tensor, segments: Tensor | None) -> Bounds:
    return Bounds(*tokens.shape) if segments is None else Bounds.of_segments(segments, padding=0)

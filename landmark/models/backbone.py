"""Embedding, layers, final norm: the part that decoders, encoders and both halves of an encoder-decoder share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..ctx import Bounds, Ctx, Memory, State
from ..nn import step
from ..nn.embedding import Embedding
from ..nn.linear import LinearConfig, replace_linears
from ..nn.norm import NormConfig
from ..nn.residual import Layer, build_layers
from .base import Init, Model, materialise

FEW = 8  # tokens of each sequence whose positions are sooner counted one by one


class Backbone(Model):
    """Token ids [B, T] to hidden states [B, T, dim]."""

    class Config(ModelConfig):
        dim: int
        embed: Embedding.Config
        layers: tuple[Layer, ...]
        norm: NormConfig | None
        context: int | None = None  # the longest text it was made for, in tokens
        init: Init = Init()
        linear: LinearConfig | None = None  # what stands for every Linear of the layers

        def build(self) -> Backbone:
            return materialise(lambda: Backbone(self), self.init)

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg: Backbone.Config = cfg
        self.embed = cfg.embed.build(cfg.dim)
        self.layers: nn.ModuleList = build_layers(cfg.layers, cfg.dim)
        if cfg.linear is not None:
            replace_linears(self.layers, cfg.linear)
        self.norm = cfg.norm.build(cfg.dim) if cfg.norm else None

    def new_state(
        self, slots: int, capacity: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> State:
        """Decoding state for `slots` sequences of up to `capacity` tokens; default: the model's dtype and device."""
        where = {"slots": slots, "capacity": capacity, "dtype": dtype or self.dtype, "device": device or self.device}
        return State(slots, [layer.new_state(**where) for layer in self.layers], capacity)  # type: ignore[operator]

    def hidden(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        types: Tensor | None = None,
        bounds: Bounds | None = None,
        state: State | None = None,
        memory: Memory | None = None,
        ctx: Ctx | None = None,
    ) -> Tensor:
        """Hidden states [B, T, dim] of tokens [B, T], after the final norm.

        `segments` [B, T]: every run of one number within a row is a sequence of its own, which nothing outside of it
        can influence (padding is just another run); `bounds` says the same ready-made. `positions` [B, T] default to
        0, 1, ... in each sequence, after what `state` holds of it. With `state`, sequence i continues slot i.
        """
        if ctx is None:
            ctx = self.context(
                tokens, segments=segments, positions=positions, bounds=bounds, state=state, memory=memory
            )
        x = self.embed(tokens, ctx.positions, types)
        stepped = None if state is None else step.through(self.layers, x, ctx, state.layers)
        if stepped is None:
            for i, layer in enumerate(self.layers):
                x = layer(x, ctx, state.layers[i] if state is not None else None)
        else:
            x = stepped
        if state is not None:
            state.lengths = [p + n for p, (_, n) in zip(state.lengths, ctx.bounds.sequences, strict=True)]
        return x if self.norm is None else self.norm(x)

    def context(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        bounds: Bounds | None = None,
        state: State | None = None,
        memory: Memory | None = None,
    ) -> Ctx:
        """Where the sequences of a call lie, and at which positions."""
        if bounds is None:
            bounds = Bounds.of_segments(segments) if segments is not None else Bounds(*tokens.shape)
        past = None
        if state is not None:
            past = tuple(state.lengths)
            if len(past) != len(bounds.sequences):
                raise ValueError(f"{len(bounds.sequences)} sequences do not fit a state of {len(past)} slots")
        latest = None
        if positions is None:
            if past is not None:
                latest = max((p + n - 1 for p, (_, n) in zip(past, bounds.sequences, strict=True)), default=None)
            if past is not None and bounds.dense and bounds.width <= FEW:
                ahead = range(bounds.width)
                positions = torch.tensor([[p + n for n in ahead] for p in past], device=tokens.device)
            else:
                positions = bounds.offsets(tokens.device)
                if past is not None and any(past):
                    before = torch.tensor(past, device=tokens.device)
                    positions = positions + (before[:, None] if bounds.dense else bounds.per_token(before))
        return Ctx(positions, bounds, past, latest, memory)

"""Decoding state: what is kept of every token (keys and values), and what is kept of every sequence.

`extend(k, v, ctx)` takes the keys and values of this call's tokens and returns those that its queries may look at, with
their bounds. Buffers are [slots, heads, capacity, d]; what is returned is viewed as [slots, tokens, heads, d].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..ctx import Bounds, Ctx
from .paged import Blocks, PagedKV, Sees


@dataclass(frozen=True)
class Place:
    """Where this call's tokens go in a cache that holds `past` tokens of each slot; the same for every layer."""

    lengths: tuple[int, ...]  # after the call
    end: int | None  # where all of them end, if slots are equally long and advance together
    width: int

    @classmethod
    def of(cls, ctx: Ctx) -> Place:
        past, bounds = _past(ctx), ctx.bounds
        lengths = tuple(p + n for p, (_, n) in zip(past, bounds.sequences, strict=True))
        together = bounds.dense and len(set(past)) == 1
        return cls(lengths, lengths[0] if together else None, max(lengths))

    @cached_property
    def seen(self) -> Bounds:
        return Bounds.padded(self.lengths, self.width)


class KVCache:
    """Keys and values of every token, up to `capacity`; memory is taken as sequences grow."""

    sees = Sees()

    def __init__(
        self, slots: int, capacity: int, heads: int, k_dim: int, v_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.k = torch.zeros(slots, heads, 0, k_dim, dtype=dtype, device=device)
        self.v = torch.zeros(slots, heads, 0, v_dim, dtype=dtype, device=device)

    def room(self, ctx: Ctx) -> tuple[Tensor, Tensor, Bounds]:
        """What `extend` gives, before this call's tokens, the last ones, are in it."""
        place = ctx.memo("place", lambda: Place.of(ctx))
        if place.width > self.k.shape[2]:
            self._grow(place.width)
        return (
            self.k.narrow(2, 0, place.width).transpose(1, 2),
            self.v.narrow(2, 0, place.width).transpose(1, 2),
            place.seen,
        )

    def whole(self, ctx: Ctx) -> tuple[Tensor, Tensor, Bounds]:
        """As `room`, with what else there is room for, and as it lies: [slots, heads, capacity, d]."""
        place = ctx.memo("place", lambda: Place.of(ctx))
        if place.width > self.k.shape[2]:
            self._grow(place.width)
        return self.k, self.v, place.seen

    def extend(self, k: Tensor, v: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Bounds]:
        place = ctx.memo("place", lambda: Place.of(ctx))
        past, bounds, width = _past(ctx), ctx.bounds, place.width
        room = self.room(ctx)
        if place.end is not None:
            self.k.narrow(2, past[0], width - past[0]).copy_(k.transpose(1, 2))
            self.v.narrow(2, past[0], width - past[0]).copy_(v.transpose(1, 2))
        elif bounds.dense and bounds.width == 1:
            slots, at = ctx.memo("slots", lambda: _index(past, k.device))
            self.k[slots, :, at], self.v[slots, :, at] = k[:, 0], v[:, 0]
        else:
            for slot, (start, n) in enumerate(bounds.sequences):
                row, col = divmod(start, bounds.width)
                self.k[slot, :, past[slot] : past[slot] + n] = k[row, col : col + n].transpose(0, 1)
                self.v[slot, :, past[slot] : past[slot] + n] = v[row, col : col + n].transpose(0, 1)
        if not any(past):
            return k, v, bounds
        return room

    def _grow(self, width: int) -> None:
        """Room for `width` tokens and as many again, so that each is moved a few times only."""
        if width > self.capacity:
            raise ValueError(f"a sequence of {width} tokens does not fit a cache of {self.capacity}")
        size = min(self.capacity, max(2 * width, 64))
        for name in ("k", "v"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], size, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def paged(self, blocks: Blocks) -> PagedKV:
        """The same of all sequences of an engine, in blocks."""
        return PagedKV(self.k, self.v, blocks)

    def select(self, slots: Tensor) -> None:
        self.k, self.v = self.k[slots], self.v[slots]

    def snapshot(self) -> Any:
        return None  # tokens past the restored lengths are never looked at

    def restore(self, snapshot: Any) -> None:
        pass


class SlotState:
    """Tensors of a fixed size for every sequence, such as the state of a recurrence: [slots, ...] each, by name.

    A mixer reads `state.tensors[name]` and puts what follows there; nothing else holds on to them.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors: dict[str, Tensor] = tensors

    def select(self, slots: Tensor) -> None:
        self.tensors = {name: tensor[slots] for name, tensor in self.tensors.items()}

    def snapshot(self) -> Any:
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def restore(self, snapshot: Any) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in snapshot.items()}


class WindowCache(SlotState):
    """Keys and values of the last `window` tokens in a ring: the rolling buffer of Mistral 7B (Jiang et al. 2023)."""

    def __init__(
        self, slots: int, window: int, heads: int, k_dim: int, v_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shapes = {"k": (slots, heads, window, k_dim), "v": (slots, heads, window, v_dim)}
        super().__init__(**{name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()})
        self.window = window

    @property
    def k(self) -> Tensor:
        """[slots, heads, window, d]: the token at position p is at p % window."""
        return self.tensors["k"]

    @property
    def v(self) -> Tensor:
        return self.tensors["v"]

    def extend(self, k: Tensor, v: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Bounds]:
        past, bounds, window = _past(ctx), ctx.bounds, self.window
        if bounds.dense and bounds.width == 1:
            slots, at = ctx.memo(("ring", window), lambda: _index([p % window for p in past], k.device))
            self.k[slots, :, at], self.v[slots, :, at] = k[:, 0], v[:, 0]
            seen = tuple(min(p + 1, window) for p in past)
            width = max(seen)  # the order of keys within the ring does not matter: one query sees them all
            held = self.k[:, :, :width].transpose(1, 2), self.v[:, :, :width].transpose(1, 2)
            return *held, Bounds.padded(seen, width)
        lengths: tuple[int, ...] = ()
        ks: list[Tensor] = []
        vs: list[Tensor] = []
        for slot, (start, n) in enumerate(bounds.sequences):
            row, col = divmod(start, bounds.width)
            ring = torch.arange(max(0, past[slot] - window), past[slot], device=k.device) % window
            for new, buffer, out in ((k, self.k, ks), (v, self.v, vs)):
                fresh = new[row, col : col + n].transpose(0, 1)
                if any(past):
                    out.append(torch.cat([buffer[slot][:, ring], fresh], 1))
                kept = min(n, window)
                at = torch.arange(past[slot] + n - kept, past[slot] + n, device=k.device) % window
                buffer[slot][:, at] = fresh[:, n - kept :]
            lengths = (*lengths, len(ring) + n)
        if not any(past):
            return k, v, bounds
        held = torch.cat(ks, 1).transpose(0, 1)[None], torch.cat(vs, 1).transpose(0, 1)[None]
        return *held, Bounds.of_lengths(lengths)


class SlidingCache(WindowCache):
    """A window that is read through `extend` alone, so that an engine may keep it in blocks instead."""

    def paged(self, blocks: Blocks) -> PagedKV:
        """The same of all sequences of an engine, in blocks, which are given back as they fall out of the window."""
        return PagedKV(self.k, self.v, blocks)

    @property
    def sees(self) -> Sees:
        return Sees(window=self.window)


class CrossCache:
    """Keys and values of the encoded source, computed at the first call."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.bounds: Bounds | None = None

    def select(self, slots: Tensor) -> None:
        if self.k is not None and self.v is not None and self.bounds is not None:
            self.k, self.v = self.k[slots], self.v[slots]
            lengths = tuple(self.bounds.sequences[slot][1] for slot in slots.tolist())
            self.bounds = Bounds.padded(lengths, self.bounds.width)

    def snapshot(self) -> Any:
        return self.k, self.v, self.bounds

    def restore(self, snapshot: Any) -> None:
        self.k, self.v, self.bounds = snapshot


def _past(ctx: Ctx) -> tuple[int, ...]:
    assert ctx.past is not None, "a state was given without its lengths"
    return ctx.past


def _index(at: list[int] | tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(len(at), device=device), torch.tensor(at, device=device)

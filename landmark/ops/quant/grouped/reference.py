"""Weights as codes of 4 or 8 bits in groups of 32, with a float16 scale each: w = scale * (code - 2^(bits - 1))."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Bits = Literal[4, 8]
GROUP, STEP = 32, 64  # columns that share a scale; columns that a row of codes and scales is padded to a multiple of


def quantise(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> codes uint8 [out, bytes], scales float16 [out, 2 * ceil(in / 64)]: rounding to the nearest.

    The number of largest magnitude in a group decides its scale: for 4 bits it becomes the code 0, as there is one
    more negative number than positive ones.
    """
    zero = 1 << (bits - 1)
    groups = F.pad(weight.float(), (0, -weight.shape[1] % STEP)).unflatten(1, (-1, GROUP))
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scales = (extreme / (-zero if bits == 4 else zero - 1)).to(torch.float16)
    codes = (groups / torch.where(scales == 0, 1, scales.float())).round().clamp(-zero, zero - 1) + zero
    return pack(codes.flatten(1).to(torch.uint8), bits), scales[..., 0]


def pack(codes: Tensor, bits: Bits) -> Tensor:
    """uint8 codes [out, n], n a multiple of 64 -> [out, bytes]. Of 4 bits, 64 bytes hold 128: byte j has column j in
    its low half and column 64 + j in its high half."""
    if bits == 8:
        return codes
    low, high = F.pad(codes, (0, -codes.shape[1] % (2 * STEP))).unflatten(1, (-1, 2, STEP)).unbind(2)
    return (low | high << 4).flatten(1)


def unpack(packed: Tensor, bits: Bits) -> Tensor:
    """The inverse of `pack`, without the columns that it added to fill bytes for 8 bits; 4 bits keep theirs."""
    if bits == 8:
        return packed
    blocks = packed.unflatten(1, (-1, STEP))
    return torch.stack([blocks & 15, blocks >> 4], 2).flatten(1)


def restore(codes: Tensor, scales: Tensor, bits: Bits, width: int, dtype: torch.dtype) -> Tensor:
    """The weight [out, width] that codes and scales stand for."""
    whole = unpack(codes, bits)[:, : scales.shape[1] * GROUP].to(torch.float32) - (1 << (bits - 1))
    return (whole.unflatten(1, (-1, GROUP)) * scales.float()[..., None]).flatten(1)[:, :width].to(dtype)


def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: Bits) -> Tensor:
    """x [..., in] times the restored weight."""
    return F.linear(x, restore(codes, scales, bits, x.shape[-1], x.dtype), bias)

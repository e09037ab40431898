"""Weights as integers of 4 or 8 bits, with a float16 scale for every 32 columns of a row: w = scale * integer.

They lie in tiles of 16 rows and 32 columns, so that a kernel's vectors take a row to a lane. codes uint8
[tiles, groups, 64 * bits] and scales float16 [tiles, groups, 16]; rows and columns are padded with zeros.

4 bits, -8 to 7, are kept plus 8. Of a tile's four times 64 bytes each is for eight columns, and a row's are four bytes
in a row: the even columns in the low two, from the low bits on, the odd ones in the high two. 8 bits, -127 to 127, are
kept as sign and magnitude. Each of eight times 64 bytes is for four columns, and each 16 of them for four rows: the
first two columns of these, then the other two.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Bits = Literal[4, 8]
TILE, GROUP = 16, 32


def shape(rows: int, width: int) -> tuple[int, int]:
    """How many tiles and groups a weight [rows, width] has."""
    return -(-rows // TILE), -(-width // GROUP)


def quantise(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """weight [rows, width] -> codes and scales: rounding to the nearest.

    The number of largest magnitude in a group decides its scale: for 4 bits it becomes -8, as there is one more
    negative number than positive ones.
    """
    tiles, columns = shape(*weight.shape)
    rows, width = weight.shape
    whole = F.pad(weight.float(), (0, columns * GROUP - width, 0, tiles * TILE - rows))
    groups = whole.unflatten(1, (columns, GROUP)).unflatten(0, (tiles, TILE)).transpose(1, 2)
    lowest, highest = groups.aminmax(dim=3)
    extreme = torch.where(-lowest >= highest, lowest, highest)
    scales = (extreme / (-8 if bits == 4 else 127)).to(torch.float16)
    ratio = torch.where(scales == 0, 0, 1 / scales.float())
    numbers = (groups * ratio[..., None]).round_().clamp_(-8 if bits == 4 else -127, 7 if bits == 4 else 127)
    return pack(numbers, bits), scales


def pack(numbers: Tensor, bits: Bits) -> Tensor:
    """Integers [tiles, groups, 16, 32], of any type -> codes [tiles, groups, 64 * bits]."""
    if bits == 4:
        codes = (numbers + 8).to(torch.uint8).unflatten(3, (4, 2, 2, 2))  # 64 bytes, byte, half of it, odd
        low, high = codes.unbind(5)
        return (low | high << 4).permute(0, 1, 3, 2, 5, 4).flatten(2)
    codes = (numbers.abs() + 128 * (numbers < 0)).to(torch.uint8).unflatten(3, (8, 2, 2)).unflatten(2, (4, 4))
    return codes.permute(0, 1, 4, 2, 5, 3, 6).flatten(2)  # 64 bytes, 4 rows, 2 columns, row, column


def unpack(codes: Tensor, bits: Bits) -> Tensor:
    """The inverse of `pack`, as float32."""
    if bits == 4:
        parts = codes.unflatten(2, (4, TILE, 2, 2)).permute(0, 1, 3, 2, 5, 4)
        return (torch.stack([parts & 15, parts >> 4], 5).flatten(3)).float() - 8
    parts = codes.unflatten(2, (8, 4, 2, 4, 2)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)
    return (parts & 127).float() * (1 - (parts >> 7).float() * 2)


def restore(codes: Tensor, scales: Tensor, bits: Bits, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """The weight [rows, width] that codes and scales stand for."""
    groups = unpack(codes, bits) * scales.float()[..., None]
    return groups.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :width].to(dtype)


def restore_rows(codes: Tensor, scales: Tensor, bits: Bits, ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [n] of the weight, [n, width]."""
    tile, row = ids // TILE, ids % TILE
    if bits == 4:
        found = codes.unflatten(2, (4, TILE, 4))[tile, :, :, row]  # [n, groups, 4, 4]
        parts = found.unflatten(3, (2, 2)).transpose(3, 4)
        numbers = torch.stack([parts & 15, parts >> 4], 4).flatten(2).float() - 8
    else:
        found = codes.unflatten(2, (8, 4, 2, 4, 2))[tile, :, :, row // 4, :, row % 4].flatten(2)
        numbers = (found & 127).float() * (1 - (found >> 7).float() * 2)
    return (numbers * scales[tile, :, row].float()[..., None]).flatten(1)[:, :width].to(dtype)


def rounded(x: Tensor) -> Tensor:
    """x [..., width] with every 32 of its columns rounded to 8 bits: -127 to 127 times a scale, the largest magnitude
    / 127. Float32, or float64 for float64; gradients pass as if nothing were rounded."""
    width = x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    groups = F.pad(x.detach().to(wide), (0, -width % GROUP)).unflatten(-1, (-1, GROUP))
    top = groups.abs().amax(-1, keepdim=True)
    by = torch.where(top > 1e-30, 127 / top, 0)
    numbers = (groups.double() * by).round_().to(wide)
    found = (numbers * (top / 127)).flatten(-2)[..., :width]
    return x + (found - x.detach()) if x.requires_grad else found


def linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: Bits, rows: int, round_x: bool = False
) -> Tensor:
    """x [..., in] times the restored weight, -> [..., rows]; `round_x`: to 8 bits."""
    kept = rounded(x) if round_x else x
    weight = restore(codes, scales, bits, rows, x.shape[-1], kept.dtype)
    return F.linear(kept, weight, None if bias is None else bias.to(kept.dtype)).to(x.dtype)

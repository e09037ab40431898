"""Matrices of numbers that are kept as codes, in tiles of 16 rows, so that a kernel's vectors take a row to a lane.

codes are uint8 [tiles, ...]; what they need besides is `side`. Rows and columns are padded with zeros. `exact` says how
bfloat16 is kept in 11 bits. Here are integers of 4 or 8 bits with a float16 scale for every 32 columns of a row,
w = scale * integer, and two tiles lie side by side: codes [pairs of tiles, groups, 2, 64 * bits], side (scales, as
int16) [pairs of tiles, groups, 2, 16].

4 bits, -8 to 7, are kept plus 8. Of a tile's four times 64 bytes each is for eight columns, and a row's are four bytes
in a row: the even columns in the low two, from the low bits on, the odd ones in the high two. 8 bits, -127 to 127, are
kept as sign and magnitude. Each of eight times 64 bytes is for four columns, and each 16 of them for four rows: the
first two columns of these, then the other two.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import exact
from .exact import TILE

Bits = Literal[4, 8, 11]
GROUP = 32
PAIRS_AT_ONCE = 128  # which bounds the memory that encoding takes


class Room(NamedTuple):
    """Shapes, and the type of the side; of 11 bits its shape depends on the numbers, and this is the least."""

    codes: tuple[int, ...]
    side: tuple[int, ...]
    side_type: torch.dtype


def room(rows: int, width: int, bits: Bits) -> Room:
    """What a matrix [rows, width] is kept in."""
    if bits == 11:
        return Room(exact.codes_shape(rows, width), exact.side_shape(rows, width), torch.int32)
    pairs, groups = -(-rows // (2 * TILE)), -(-width // GROUP)
    return Room((pairs, groups, 2, 64 * bits), (pairs, groups, 2, TILE), torch.int16)


def unit(bits: int) -> int:
    """Rows whose codes lie together."""
    return TILE if bits == 11 else 2 * TILE


def encode(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """weight [rows, width] -> codes and side. Raises ValueError for other numbers than bfloat16 in 11."""
    if bits == 11:
        return exact.encode(weight)
    rows, width = weight.shape
    found = room(rows, width, bits)
    codes = torch.empty(found.codes, dtype=torch.uint8, device=weight.device)
    side = torch.empty(found.side, dtype=found.side_type, device=weight.device)
    for first in range(0, len(codes), PAIRS_AT_ONCE):
        here = slice(first, first + PAIRS_AT_ONCE)
        numbers, scales = quantise(weight[2 * TILE * here.start : 2 * TILE * here.stop], bits)
        codes[here] = pack(numbers, bits).unflatten(0, (-1, 2)).transpose(1, 2)
        side[here] = scales.view(torch.int16).unflatten(0, (-1, 2)).transpose(1, 2)
    return codes, side


def quantise(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """weight [rows, width] -> integers [tiles, groups, 16, 32], of an even number of tiles, and scales (float16)
    [tiles, groups, 16]: rounding to the nearest.

    The number of largest magnitude in a group decides its scale: for 4 bits it becomes -8, as there is one more
    negative number than positive ones.
    """
    rows, width = weight.shape
    whole = F.pad(weight.float(), (0, -width % GROUP, 0, -rows % (2 * TILE)))
    groups = whole.unflatten(1, (-1, GROUP)).unflatten(0, (-1, TILE)).transpose(1, 2)
    lowest, highest = groups.aminmax(dim=3)
    extreme = torch.where(-lowest >= highest, lowest, highest)
    scales = (extreme / (-8 if bits == 4 else 127)).to(torch.float16)
    ratio = torch.where(scales == 0, 0, 1 / scales.float())
    numbers = (groups * ratio[..., None]).round_().clamp_(-8 if bits == 4 else -127, 7 if bits == 4 else 127)
    return numbers, scales


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


def restore(codes: Tensor, side: Tensor, bits: Bits, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """The weight [rows, width] that codes and side stand for."""
    if bits == 11:
        return exact.decode(codes, side, rows, width).to(dtype)
    groups = unpack(_tiles(codes), bits) * _scales(_tiles(side))[..., None]
    return groups.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :width].to(dtype)


def restore_rows(codes: Tensor, side: Tensor, bits: Bits, ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [n] of the weight, [n, width]."""
    if bits == 11:
        return exact.decode_rows(codes, side, ids, width).to(dtype)
    pair, which, row = ids // (2 * TILE), ids % (2 * TILE) // TILE, ids % TILE
    codes, side = codes[pair, :, which], side[pair, :, which, row]
    at = torch.arange(len(ids), device=ids.device)
    if bits == 4:
        found = codes.unflatten(2, (4, TILE, 4))[at, :, :, row]  # [n, groups, 4, 4]
        parts = found.unflatten(3, (2, 2)).transpose(3, 4)
        numbers = torch.stack([parts & 15, parts >> 4], 4).flatten(2).float() - 8
    else:
        found = codes.unflatten(2, (8, 4, 2, 4, 2))[at, :, :, row // 4, :, row % 4].flatten(2)
        numbers = (found & 127).float() * (1 - (found >> 7).float() * 2)
    return (numbers * _scales(side)[..., None]).flatten(1)[:, :width].to(dtype)


def _tiles(held: Tensor) -> Tensor:
    """[pairs, groups, 2, ..] -> [tiles, groups, ..]."""
    return held.transpose(1, 2).flatten(0, 1)


def _scales(side: Tensor) -> Tensor:
    return side.view(torch.float16).float()


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
    x: Tensor, codes: Tensor, side: Tensor, bias: Tensor | None, bits: Bits, rows: int, round_x: bool = False
) -> Tensor:
    """x [..., in] times the restored weight, -> [..., rows]; `round_x`: to 8 bits."""
    kept = rounded(x) if round_x else x
    weight = restore(codes, side, bits, rows, x.shape[-1], kept.dtype)
    return F.linear(kept, weight, None if bias is None else bias.to(kept.dtype)).to(x.dtype)

"""bfloat16 in 12 bits, of which nothing is lost: a trained matrix has few exponents.

Of a number's 16 bits the low byte is kept as it is. Of high bytes, a sign and seven bits of the exponent, every tile of
16 rows has a table of 16, with 0 first; four bits point to one. Numbers whose high byte is not in the table, one or two
in ten thousand where they are normally distributed, are 0 and stand in a list. (Zhang et al. 2025, DFloat11, keep the
exponent in a code of variable length, 11 bits in all.)

codes uint8 [tiles, steps of 8 columns, 192]: 64 bytes of pointers, the low four bits of each for the first 64 low bytes
and the high four for the second, then those low bytes, of four columns each; of these every 16 are for four rows, first
their first two columns, then the other two.

side int32 [5 tiles + 1 + 2 LIST]: the tables (16 bytes a tile), where each tile's part of the list begins and the last
one's ends, and the list: 16 times the column plus the row in its tile, and the number's bits. The list has room for one
number in 512.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE, STEP = 16, 8
RARE = 512  # of so many numbers one may be outside its tile's table


def codes_shape(rows: int, width: int) -> tuple[int, ...]:
    return -(-rows // TILE), -(-width // STEP), TILE * STEP * 3 // 2


def side_shape(rows: int, width: int) -> tuple[int, ...]:
    tiles = -(-rows // TILE)
    return (5 * tiles + 1 + 2 * _longest(rows, width),)


def _longest(rows: int, width: int) -> int:
    return rows * width // RARE + 64


def parts(side: Tensor, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views: tables uint8 [tiles, 16], starts int32 [tiles + 1], the list int32 [LIST, 2]."""
    tables, starts, rest = side.split([4 * tiles, tiles + 1, len(side) - 5 * tiles - 1])
    return tables.view(torch.uint8).view(tiles, TILE), starts, rest.view(-1, 2)


def check(weight: Tensor) -> None:
    """Raise ValueError for other numbers than bfloat16."""
    if weight.dtype != torch.bfloat16:
        kind = str(weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"12 bits keep bfloat16 numbers, and these are {kind}: load the model as bfloat16 (--dtype bfloat16)"
        )


class TooRare(ValueError):
    """More numbers than the list has room for have exponents that are not in the tables."""


def check_rare(rows: int, width: int, count: int) -> None:
    """Raise TooRare for more than the list has room for."""
    if count > (most := _longest(rows, width)):
        raise TooRare(
            f"{count} of the {rows} x {width} numbers have rare exponents; 12 bits have room for {most} of them"
        )


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight bfloat16 [rows, width] -> codes and side. Raises TooRare, and ValueError
    for other types."""
    check(weight)
    rows, width = weight.shape
    tiles, steps, _ = codes_shape(rows, width)
    bits = F.pad(
        weight.contiguous().view(torch.int16).int() & 0xFFFF, (0, steps * STEP - width, 0, tiles * TILE - rows)
    )
    high, low = bits.view(tiles, -1) >> 8, (bits & 255).to(torch.uint8)
    count = high.new_zeros(tiles, 256).scatter_add_(1, high.long(), torch.ones_like(high))
    count[:, 0] = -1
    tables = F.pad(count.sort(dim=1, descending=True, stable=True).indices[:, :15], (1, 0))
    order = torch.arange(15, -1, -1, dtype=torch.int32, device=weight.device).expand(tiles, -1)
    pointer = high.new_full((tiles, 256), 16).scatter_(1, tables.flip(1), order)
    found = pointer.gather(1, high.long()).view(tiles, TILE, -1)
    rare = found == 16
    side = torch.zeros(side_shape(rows, width), dtype=torch.int32, device=weight.device)
    own, starts, listed = parts(side, tiles)
    own.copy_(tables)
    starts[1:] = rare.sum((1, 2)).cumsum(0)
    check_rare(rows, width, int(starts[-1]))
    tile, row, column = rare.nonzero(as_tuple=True)
    listed[: len(tile), 0] = (column * TILE + row).int()
    listed[: len(tile), 1] = bits.view(tiles, TILE, -1)[rare]
    low = _laid(low.view(tiles, TILE, -1).masked_fill(rare, 0))
    first, second = _laid(found.masked_fill(rare, 0).to(torch.uint8)).unbind(2)
    return torch.cat([first | second << 4, low.flatten(2)], 2), side


def _laid(numbers: Tensor) -> Tensor:
    """[tiles, 16, columns] -> [tiles, steps, 2, 64]."""
    whole = numbers.unflatten(2, (-1, 2, 2, 2)).unflatten(1, (4, 4))  # 4 rows, row, step, half of it, pair, column
    return whole.permute(0, 3, 4, 1, 5, 2, 6).flatten(3)


def decode(codes: Tensor, side: Tensor, rows: int, width: int) -> Tensor:
    """The bfloat16 numbers [rows, width]."""
    if codes.is_meta:
        return torch.empty(rows, width, dtype=torch.bfloat16, device=codes.device)
    tiles, steps, _ = codes.shape
    tables, starts, listed = parts(side, tiles)
    high = tables.gather(1, _pointers(codes).flatten(1).long()).view(tiles, steps, 2, 64)
    bits = (high.int() << 8 | codes[..., 64:].view(tiles, steps, 2, 64)).view(tiles, steps, 2, 4, 2, 4, 2)
    whole = bits.permute(0, 3, 5, 1, 2, 4, 6).reshape(tiles * TILE, steps * STEP)
    tile = torch.arange(tiles, device=codes.device).repeat_interleave(starts.diff())
    place, number = listed[: len(tile)].unbind(1)
    whole[tile * TILE + place % TILE, place // TILE] = number
    return whole[:rows, :width].to(torch.int16).view(torch.bfloat16)


def decode_rows(codes: Tensor, side: Tensor, ids: Tensor, width: int) -> Tensor:
    """Rows `ids` [n] of the numbers, [n, width]."""
    if codes.is_meta:
        return torch.empty(len(ids), width, dtype=torch.bfloat16, device=codes.device)
    tiles, steps, _ = codes.shape
    tables, starts, listed = parts(side, tiles)
    tile, row = ids // TILE, ids % TILE
    at = row[:, None] // 4 * 16 + row[:, None] % 4 * 2 + torch.tensor([0, 1, 8, 9], device=ids.device)  # bytes of a row
    found = codes[tile].gather(2, torch.cat([at, at + 64, at + 128], 1)[:, None].expand(-1, steps, -1))
    pointer, low = torch.cat([found[..., :4] & 15, found[..., :4] >> 4], 2), found[..., 4:]
    high = tables[tile].gather(1, pointer.flatten(1).long())
    bits = high.int() << 8 | low.flatten(1)
    first = starts[tile].long()
    count = starts[tile + 1] - first
    which = torch.arange(len(ids), device=ids.device).repeat_interleave(count)
    entry = listed[torch.arange(len(which), device=ids.device) - (count.cumsum(0) - count - first)[which]]
    entry, which = entry[mine := entry[:, 0] % TILE == row[which]], which[mine]
    bits[which, entry[:, 0] // TILE] = entry[:, 1]
    return bits[:, :width].to(torch.int16).view(torch.bfloat16)


def _pointers(codes: Tensor) -> Tensor:
    """[tiles, steps, 2, 64]."""
    return torch.stack([codes[..., :64] & 15, codes[..., :64] >> 4], 2)

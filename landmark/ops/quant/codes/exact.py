"""bfloat16 in 11 bits and a little, of which nothing is lost: a trained matrix has few exponents.

Of a number's 16 bits the sign and the fraction are kept as they are, 8 bits. Of exponents, the other 8, every tile of
16 rows has a table of 7; three bits point to one, and where they are 7 the exponent stands beside: that of 2 to 3
numbers in a hundred, where they are normally distributed or trained. (Zhang et al. 2025, DFloat11, keep it in
a code of variable length, 11 bits in all.) Exponents are kept rotated, their lowest bit on top.

codes uint8 [tiles, steps of 32 columns, 704]: 128 bytes of the pointers' lower two bits, 64 of their highest, 512 of
sign and fraction. Numbers are taken 64 at a time, of four columns; of these every 16 are of four rows, first their
first two columns, then the other two. Of the first 128 bytes 64 are for four times 64 numbers, from their lowest bits
on; of the next each 8 are for 64, a bit a number.

side int32 [tiles + 1 + 2 tiles + R]: where each tile's exponents begin and the last one's end, the tables (8 bytes a
tile, of which 7 are used), and the exponents, bytes in the order of their numbers', with 192 more that kernels read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE, STEP = 16, 32
TABLE = 7  # exponents of a table, and the pointer to none of them
SPARE = 192
ROWS_AT_ONCE = 256  # which bounds the memory that looking them up takes


def codes_shape(rows: int, width: int) -> tuple[int, ...]:
    return -(-rows // TILE), -(-width // STEP), TILE * STEP * 11 // 8


def side_shape(rows: int, width: int, beside: int = 0) -> tuple[int, ...]:
    """`beside`: how many numbers' exponents are in no table."""
    tiles = -(-rows // TILE)
    return (3 * tiles + 1 + -(-(beside + SPARE) // 4),)


def parts(side: Tensor, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views: starts int32 [tiles + 1], tables uint8 [tiles, 8], exponents uint8 [..]."""
    starts, tables, beside = side.split([tiles + 1, 2 * tiles, len(side) - 3 * tiles - 1])
    return starts, tables.view(torch.uint8).view(tiles, 8), beside.view(torch.uint8)


def check(weight: Tensor) -> None:
    """Raise ValueError for other numbers than bfloat16."""
    if weight.dtype != torch.bfloat16:
        kind = str(weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"11 bits keep bfloat16 numbers, and these are {kind}: load the model as bfloat16 (--dtype bfloat16)"
        )


def check_side(side: Tensor, rows: int, width: int) -> None:
    """Raise ValueError for what cannot stand beside the codes of a matrix [rows, width]."""
    tiles = -(-rows // TILE)
    least = side_shape(rows, width)[0]
    if side.dtype != torch.int32 or side.dim() != 1 or len(side) < least:
        kind = str(side.dtype).removeprefix("torch.")
        raise ValueError(f"is {kind} {list(side.shape)}; {rows} x {width} numbers need int32 [{least}] or longer")
    starts = side[: tiles + 1]
    if starts[0] != 0 or (starts.diff() < 0).any() or side_shape(rows, width, int(starts[-1])) != side.shape:
        raise ValueError(f"does not say where the exponents of its {tiles} tiles begin: the file is damaged")


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight bfloat16 [rows, width] -> codes and side. Raises ValueError for other types."""
    check(weight)
    rows, width = weight.shape
    tiles, steps, _ = codes_shape(rows, width)
    bits = F.pad(weight.contiguous().view(torch.int16).int() & 0xFFFF, (0, steps * STEP - width))
    laid = _laid(F.pad(bits, (0, 0, 0, tiles * TILE - rows)).view(tiles, TILE, -1))
    inside = torch.ones(rows, width, dtype=torch.bool, device=weight.device)
    inside = F.pad(inside, (0, steps * STEP - width, 0, tiles * TILE - rows)).view(tiles, TILE, -1)
    exponent, own = laid >> 8 & 127 | laid & 128, (laid >> 8 & 128 | laid & 127).to(torch.uint8)
    flat, inside = exponent.view(tiles, -1).long(), _laid(inside).view(tiles, -1)
    count = flat.new_zeros(tiles, 256).scatter_add_(1, flat, inside.long())
    table = count.sort(dim=1, descending=True, stable=True).indices[:, :TABLE]
    order = torch.arange(TABLE, device=weight.device).expand(tiles, -1)
    pointer = flat.new_full((tiles, 256), TABLE).scatter_(1, table, order).gather(1, flat)
    pointer *= inside
    beside = pointer == TABLE
    starts = F.pad(beside.sum(1).cumsum(0), (1, 0)).int()
    side = torch.zeros(side_shape(rows, width, int(starts[-1])), dtype=torch.int32, device=weight.device)
    at, tables, rest = parts(side, tiles)
    at.copy_(starts)
    tables[:, :TABLE] = table
    rest[: int(starts[-1])] = flat[beside].to(torch.uint8)
    shifts = torch.arange(8, device=weight.device)
    lower = (pointer.view(tiles, steps, 2, 4, 64) % 4 << 2 * shifts[:4, None]).sum(3)
    highest = (pointer.view(tiles, steps, 64, 8) // 4 << shifts).sum(3)
    return torch.cat([lower.flatten(2).to(torch.uint8), highest.to(torch.uint8), own.flatten(2)], 2), side


def _laid(numbers: Tensor) -> Tensor:
    """[tiles, 16, columns] -> [tiles, steps, 8, 64]."""
    whole = numbers.unflatten(2, (-1, 8, 2, 2)).unflatten(1, (4, 4))  # 4 rows, row, step, 64 of it, pair, column
    return whole.permute(0, 3, 4, 1, 5, 2, 6).flatten(3)


def decode(codes: Tensor, side: Tensor, rows: int, width: int) -> Tensor:
    """The bfloat16 numbers [rows, width]."""
    if codes.is_meta:
        return torch.empty(rows, width, dtype=torch.bfloat16, device=codes.device)
    starts, tables, beside = parts(side, len(codes))
    whole = _numbers(codes, tables, beside[: int(starts[-1])])
    return whole.flatten(0, 1)[:rows, :width]


def decode_rows(codes: Tensor, side: Tensor, ids: Tensor, width: int) -> Tensor:
    """Rows `ids` [n] of the numbers, [n, width]."""
    found = torch.empty(len(ids), width, dtype=torch.bfloat16, device=codes.device)
    if codes.is_meta:
        return found
    starts, tables, beside = parts(side, len(codes))
    for y, some in zip(found.split(ROWS_AT_ONCE), ids.split(ROWS_AT_ONCE), strict=True):
        tile = some // TILE
        first = starts[tile].long()
        count = starts[tile + 1] - first
        at = torch.arange(int(count.sum()), device=ids.device)
        at += (first - (count.cumsum(0) - count)).repeat_interleave(count)
        whole = _numbers(codes[tile], tables[tile], beside[at])
        y.copy_(whole[torch.arange(len(some), device=ids.device), some % TILE, :width])
    return found


def _numbers(codes: Tensor, tables: Tensor, beside: Tensor) -> Tensor:
    """The numbers [tiles, 16, columns] of codes, tables and all exponents that stand beside."""
    lower, highest, own = codes.split([128, 64, 512], 2)
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    lower = lower.unflatten(2, (2, 1, 64)) >> 2 * shifts[:4, None] & 3
    pointer = lower.flatten(2) + 4 * (highest[..., None] >> shifts & 1).flatten(2)
    own = own.unflatten(2, (8, 64)).int()
    exponent = tables.gather(1, pointer.flatten(1).long()).view_as(own)
    exponent[pointer.view_as(own) == TABLE] = beside
    exponent = exponent.int()
    bits = (own << 8 & 0x8000 | exponent << 8 & 0x7F00 | exponent & 128 | own & 127).unflatten(3, (4, 2, 4, 2))
    whole = bits.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2).flatten(2)
    return whole.to(torch.int16).view(torch.bfloat16)

"""Packing: documents into rows of equal length, as a plan of fragments; no token is read here."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Literal

from .order import DocumentStream, Fragment

Row = list[Fragment]
Packing = Literal["concatenate", "best-fit"]


def concatenate(stream: DocumentStream, length: int, rows: int) -> list[Row]:
    """Up to `rows` rows of `length` tokens, documents one after the other; what does not fit continues in the next row
    as a fragment of its own. Only the stream's end leaves a row unfilled."""
    out: list[Row] = []
    for _ in range(rows):
        row: Row = []
        room = length
        while room and (fragment := stream.take()) is not None:
            if fragment.length > room:
                taken = fragment._replace(length=room)
                stream.put_back(fragment._replace(start=fragment.start + room, length=fragment.length - room))
                fragment = taken
            row.append(fragment)
            room -= fragment.length
        if not row:
            break
        out.append(row)
    return out


def best_fit(stream: DocumentStream, length: int, rows: int) -> list[Row]:
    """About `rows` rows of at most `length` tokens: documents are cut only where they are longer than a row, and what
    is left of them goes, the longest first, where it leaves the least room (Ding et al., 2404.10830)."""
    out: list[Row] = []
    pieces: list[Fragment] = []
    tokens = 0
    while tokens < rows * length and (document := stream.take()) is not None:
        tokens += document.length
        for start in range(0, document.length, length):
            piece = document._replace(start=start, length=min(length, document.length - start))
            if piece.length == length:
                out.append([piece])
            else:
                pieces.append(piece)
    pieces.sort(key=lambda piece: -piece.length)  # stable: equal lengths stay in the stream's order
    open_rows: list[tuple[int, int]] = []  # (room, number), sorted
    for piece in pieces:
        at = bisect_left(open_rows, (piece.length, 0))
        if at == len(open_rows):
            room, number = length, len(out)
            out.append([])
        else:
            room, number = open_rows.pop(at)
        out[number].append(piece)
        if room > piece.length:
            insort(open_rows, (room - piece.length, number))
    return out


PACKINGS = {"concatenate": concatenate, "best-fit": best_fit}

"""gettext catalogues: the messages of programs and their translations, from .po and .mo files."""

from __future__ import annotations

import ast
import re
import struct
from collections.abc import Iterator
from pathlib import Path

Pair = tuple[str, str]


def read(path: Path) -> Iterator[Pair]:
    """(message, translation) in the order of the file.  Untranslated, fuzzy and obsolete messages and the header are
    left out; of a plural the singular goes with the first form and the plural with the last.  Raises ValueError when
    the file is not a catalogue."""
    try:
        entries = _read_mo(path.read_bytes()) if path.suffix == ".mo" else _read_po(_decode_po(path.read_bytes()))
        for message, forms in entries:
            if message[0] and forms:
                yield message[0], forms[0]
                if len(message) > 1 and len(forms) > 1:
                    yield message[1], forms[-1]
    except (ValueError, SyntaxError, struct.error, LookupError) as error:
        raise ValueError(f"{path} is not a gettext catalogue that can be read: {error}") from error


def _charset(header: str) -> str:
    match = re.search(r"charset=([\w.:-]+)", header)
    return match.group(1) if match and match.group(1) != "CHARSET" else "utf-8"


def _read_mo(data: bytes) -> Iterator[tuple[list[str], list[str]]]:
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
    if order is None:
        raise ValueError("it does not begin as a .mo file does")
    count, messages, translations = struct.unpack_from(f"{order}3I", data, 8)

    def strings(table: int) -> list[bytes]:
        places = struct.unpack_from(f"{order}{2 * count}I", data, table)
        if any(start + length > len(data) for length, start in zip(places[::2], places[1::2], strict=True)):
            raise ValueError("it is cut off")
        return [data[start : start + length] for length, start in zip(places[::2], places[1::2], strict=True)]

    pairs = list(zip(strings(messages), strings(translations), strict=True))
    charset = _charset(next((text.decode("ascii", "replace") for message, text in pairs if not message), ""))
    for message, text in pairs:
        plain = message.decode(charset).rpartition("\x04")[2]  # a context comes before it
        yield plain.split("\0"), [form for form in text.decode(charset).split("\0") if form]


def _decode_po(data: bytes) -> str:
    return data.decode(_charset(data[:4096].decode("ascii", "replace"))).removeprefix("\ufeff")


def _read_po(text: str) -> Iterator[tuple[list[str], list[str]]]:
    fields: dict[str, str] = {}
    fuzzy, current = False, ""
    for line in [*text.split("\n"), ""]:
        line = line.strip()
        match = re.match(r'(msg\w+(?:\[\d+\])?)\s*(".*")$', line)
        begins = line.startswith("#") or (match is not None and match[1] in ("msgid", "msgctxt"))
        if fields and (not line or (begins and current.startswith("msgstr"))):
            if not fuzzy and "msgid" in fields:
                message = [fields[key] for key in ("msgid", "msgid_plural") if key in fields]
                yield message, [form for key, form in fields.items() if key.startswith("msgstr") and form]
            fields, fuzzy, current = {}, False, ""
        if line.startswith("#,") and "fuzzy" in line:
            fuzzy = True
        if match:
            current = match[1]
            fields[current] = ast.literal_eval(match[2])
        elif line.startswith('"'):
            if not current:
                raise ValueError(f"a string without a keyword: {line}")
            fields[current] += ast.literal_eval(line)
        elif line and not line.startswith("#"):
            raise ValueError(f"not a line of a .po file: {line[:60]!r}")

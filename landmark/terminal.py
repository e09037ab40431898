"""Standard input and output, whatever they are connected with, and what may be shown there."""

from __future__ import annotations

import io
import os
import sys


def settle() -> None:
    """Streams that are closed become empty ones. What a terminal cannot show is a question mark; files and pipes get
    UTF-8, whatever the locale is."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")


def read_input() -> str:
    """All of standard input. Raises ValueError for what is no text."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"standard input is no text in {error.encoding.upper()} (byte {error.start} is {byte:#x})"
        ) from None


def printable(text: str) -> str:
    """Text without the control characters that would steer a terminal."""
    return "".join(c for c in text if (c >= " " and not "\x7f" <= c < "\xa0") or c in "\n\t")

"""`landmark embed`: texts as vectors, and how alike they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..terminal import printable, read_input

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor


def embed(
    model: Annotated[str, typer.Argument(help="Directory or hub id of an encoder.")],
    text: Annotated[list[str] | None, typer.Option(help="A text; may be given several times.")] = None,
    file: Annotated[list[Path] | None, typer.Option(help="A file with a text in each line.")] = None,
    pool: Annotated[str | None, typer.Option(help="mean, cls or lasttoken; default: as the model says.")] = None,
    normalise: Annotated[
        bool | None, typer.Option("--normalise/--raw", help="Vectors of length 1; default: as the model says.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: as stored.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the vectors as JSON.")] = False,
) -> None:
    """Embed texts (without --text and --file: lines of standard input) and show how alike each two of them are, or of
    many texts, which other one is the most like each.
    """
    from torch.nn import functional as F

    from ..infer.sentences import SentenceEncoder
    from ..weights.files import read_text

    if not text and not file and sys.stdin.isatty():
        raise ValueError("there is nothing to embed; give --text TEXT or --file FILE, or pipe lines in")
    read = [read_text(path) for path in file or ()] or ([] if text else [read_input()])
    lines = [line for part in read for line in part.split("\n")]
    texts = [*(text or ()), *(line for line in lines if line.strip())]
    if not texts:
        raise ValueError("there is nothing to embed; give --text TEXT, --file FILE or lines on standard input")
    encoder = SentenceEncoder.load(model, pool=pool, normalise=normalise, dtype=dtype, device=device)
    vectors = encoder.embed(texts).float().cpu()
    if as_json:
        print(json.dumps([{"text": t, "embedding": v} for t, v in zip(texts, vectors.tolist(), strict=True)]))
        return
    from rich.console import Console

    unit = F.normalize(vectors, dim=-1)
    console = Console(markup=False, highlight=False)
    fits = 8 * len(texts) <= console.width - 30
    show = matrix if fits else neighbours
    console.print(f"cosine, {vectors.shape[1]} dimensions", style="italic")
    console.print(show([printable(text) for text in texts], unit))


def matrix(texts: list[str], unit: Tensor) -> Table:
    """Each text with each, from vectors of length 1."""
    from rich.table import Table

    table = Table("", "text", *map(str, range(1, len(texts) + 1)))
    for i, row in enumerate((unit @ unit.T).tolist()):
        table.add_row(str(i + 1), texts[i], *(f"{value:.3f}" for value in row))
    return table


def neighbours(texts: list[str], unit: Tensor) -> Table:
    """Each text with the one most like it, for more of them than there are columns."""
    from rich.table import Table

    table = Table("", "text", "", "the nearest", "cosine", expand=True)
    for column in (table.columns[1], table.columns[3]):
        column.no_wrap, column.ratio = True, 1
    for i, vector in enumerate(unit):
        cosines = unit @ vector
        cosines[i] = -2.0
        j = int(cosines.argmax())
        table.add_row(str(i + 1), texts[i], str(j + 1), texts[j], f"{cosines[j]:.3f}")
    return table

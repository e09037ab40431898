"""`landmark embed`: texts as vectors, and how alike they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


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
    """Embed texts (without --text and --file: lines of standard input) and show how alike each two of them are."""
    from torch.nn import functional as F

    from ..infer.sentences import SentenceEncoder
    from ..weights.files import read_text

    lines = [line for path in file or () for line in read_text(path).splitlines()]
    if not text and not file:
        lines = sys.stdin.read().splitlines()
    texts = [*(text or ()), *(line for line in lines if line.strip())]
    if not texts:
        raise ValueError("there is nothing to embed; give --text TEXT, --file FILE or lines on standard input")
    encoder = SentenceEncoder.load(model, pool=pool, normalise=normalise, dtype=dtype, device=device)
    vectors = encoder.embed(texts).float().cpu()
    if as_json:
        print(json.dumps([{"text": t, "embedding": v} for t, v in zip(texts, vectors.tolist(), strict=True)]))
        return
    from rich.console import Console
    from rich.table import Table

    unit = F.normalize(vectors, dim=-1)
    table = Table("", "text", *map(str, range(1, len(texts) + 1)), title=f"cosine, {vectors.shape[1]} dimensions")
    for i, row in enumerate((unit @ unit.T).tolist()):
        table.add_row(str(i + 1), texts[i], *(f"{value:.3f}" for value in row))
    Console().print(table)

"""`landmark transform`: another shape for a trained model, to be trained further."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer


def transform(
    model: Annotated[str, typer.Argument(help="Directory or hub id.")],
    out: Annotated[Path, typer.Argument(help="Where the new model goes: a directory that is not there yet.")],
    kv_heads: Annotated[
        int | None, typer.Option(help="As many key-value heads, means of groups of the old ones (Ainslie et al. 2023).")
    ] = None,
    drop_layers: Annotated[
        int | None,
        typer.Option(help="Twice as deep, without so many layers at each side of the seam (SOLAR, Kim et al. 2023)."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: as stored.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Fewer key-value heads, or more layers, for a trained model. The new one begins near the old, and goes on to be
    trained: landmark train run.toml --set model=OUT
    """
    if kv_heads is None and drop_layers is None:
        raise ValueError("there is nothing to transform; give --kv-heads N or --drop-layers N, or both")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; give a directory that is not there yet")

    from ..models.inspect import count, depth
    from ..transforms.depth import upscale_depth
    from ..transforms.uptrain import pool_heads
    from ..weights.checkpoint import load, save

    old = new = load(model, dtype=dtype)
    if kv_heads is not None:
        new = pool_heads(new, kv_heads)
    if drop_layers is not None:
        new = upscale_depth(new, drop_layers)
    save(new, out)
    figures = {"parameters": (count(old), count(new)), "layers": (depth(old), depth(new))}
    if as_json:
        report = {"out": str(out), **{name: {"from": a, "to": b} for name, (a, b) in figures.items()}}
        print(json.dumps(report))
        return
    for name, (before, after) in figures.items():
        print(f"{name}: {before:,} -> {after:,}")
    print(f"The model is in {out}. Next: landmark inspect {shlex.quote(str(out))}")

"""`landmark convert`: authors' weight files as model directories."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer


def convert(
    file: Annotated[Path, typer.Argument(help="A .pth file of RWKV-4, 5, 6 or 7. Nothing in it is executed.")],
    out: Annotated[Path, typer.Argument(help="Where the model goes: a directory that is not there yet.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: as stored.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a model directory (config.json, safetensors) from the .pth file that the authors of a model publish."""
    from ..weights.files import check_new

    check_new(out)

    from ..models.inspect import count
    from ..weights.pth import convert

    model = convert(file, out, dtype=dtype)
    assert model.origin is not None
    kind = model.origin.hf["model_type"]
    if as_json:
        print(json.dumps({"out": str(out), "model_type": kind, "parameters": count(model)}))
        return
    print(f"{kind} of {count(model):,} parameters is in {out}. Next: landmark inspect {shlex.quote(str(out))}")

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
    rope: Annotated[
        str | None, typer.Option(help="Stretch rotary positions: linear, ntk, dynamic, yarn, llama3, or abf.")
    ] = None,
    factor: Annotated[
        float | None, typer.Option(help="How many times longer the context becomes, with --rope.")
    ] = None,
    theta: Annotated[float | None, typer.Option(help="The new rotary base, with --rope abf.")] = None,
    bitnet: Annotated[
        bool, typer.Option("--bitnet", help="Ternary linear maps in the layers, to be trained (BitNet b1.58).")
    ] = False,
    pack: Annotated[
        bool, typer.Option("--pack", help="Ternary linear maps in two bits a weight, to be used and trained no more.")
    ] = False,
    quantise: Annotated[
        str | None,
        typer.Option(
            help="Weights of 4 or 8 bits, to be used, not trained: int8, int4, int4-all, or one with -a8. bf16-11: "
            "bfloat16 in 11 bits, nothing lost."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="A LoRA directory or hub id (PEFT) to merge; several add up.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: as stored.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Fewer key-value heads, more layers, a longer context or ternary weights for a trained model. The new one begins
    near the old, and goes on to be trained: landmark train run.toml --set model=OUT

    With --adapter, LoRA adapters become part of the weights; with --quantise, weights become smaller files that are
    served from where they lie: landmark transform MODEL OUT --quantise int4
    """
    if not any((kv_heads is not None, drop_layers is not None, rope, bitnet, pack, quantise, adapter)):
        raise ValueError(
            "there is nothing to transform; give --kv-heads N, --drop-layers N, --rope WAY, --bitnet, --pack, "
            "--quantise WAY or --adapter DIRECTORY"
        )
    if rope is None and (factor is not None or theta is not None):
        raise ValueError(f"--{'theta' if factor is None else 'factor'} goes with --rope; give that too")
    if rope is not None and rope != "abf" and factor is None:
        raise ValueError(f"--rope {rope} needs --factor: how many times longer the context becomes")

    from ..models.inspect import count, depth, longest_text
    from ..transforms import bitnet as ternary
    from ..transforms.depth import upscale_depth
    from ..transforms.extend import extend_context
    from ..transforms.lora import merge, read_adapter
    from ..transforms.quantise import quantised
    from ..transforms.uptrain import pool_heads
    from ..weights.checkpoint import load, save
    from ..weights.files import check_new, new_directory

    check_new(out)
    old = new = load(model, dtype=dtype)
    for one in [read_adapter(where, old) for where in adapter or ()]:
        merge(old, one)
    if kv_heads is not None:
        new = pool_heads(new, kv_heads)
    if drop_layers is not None:
        new = upscale_depth(new, drop_layers)
    if rope is not None:
        new = extend_context(new, rope, 1.0 if factor is None else factor, theta=theta)
    if bitnet:
        new = ternary.bitnet(new)
    if pack:
        new = ternary.pack_ternary(new)
    if quantise is not None:
        new = quantised(new, quantise)
    with new_directory(out) as fresh:
        save(new, fresh)
    figures = {"parameters": (count(old), count(new)), "layers": (depth(old), depth(new))}
    figures["context"] = (longest_text(old) or 0, longest_text(new) or 0)
    if as_json:
        report = {"out": str(out), **{name: {"from": a, "to": b} for name, (a, b) in figures.items()}}
        print(json.dumps(report))
        return
    for name, (before, after) in figures.items():
        print(f"{name}: {before:,} -> {after:,}")
    print(f"The model is in {out}. Next: landmark inspect {shlex.quote(str(out))}")

"""`landmark eval`: perplexity and bits per byte, multiple choice, and tasks of the evaluation harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model directory or hub id.")],
    text: Annotated[list[Path] | None, typer.Option(help="Text file: perplexity and bits per byte.")] = None,
    choices: Annotated[list[Path] | None, typer.Option(help="JSONL of questions: context, choices, answer.")] = None,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval tasks, with commas.")] = "",
    include: Annotated[Path | None, typer.Option(help="Folder of task files (YAML).")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Solved examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many documents of a task.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="How far the windows of --text move, in tokens.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Longest text in one piece, in tokens.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: as stored.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity and bits per byte of texts, accuracy on multiple-choice questions, and lm-eval tasks."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not (text or choices or names):
        raise ValueError("nothing to evaluate; give --text FILE, --choices FILE.jsonl or --tasks NAMES")
    import landmark

    from ..evals.choices import evaluate_choices, read_questions
    from ..evals.harness import run_tasks
    from ..evals.likelihood import LanguageModel
    from ..models.base import kind
    from ..models.decoder import Decoder
    from ..weights.checkpoint import locate
    from ..weights.files import read_text
    from ..weights.tokenizer import Tokenizer

    directory = locate(model)
    built = landmark.load(directory, dtype=dtype, device=device)
    if not isinstance(built, Decoder):
        raise ValueError(f"{model} is {kind(built)}; evaluation by likelihood needs a decoder")
    lm = LanguageModel(built, Tokenizer.load(directory), context=context)
    rows: list[dict[str, Any]] = []
    for path in text or ():
        out = lm.perplexity(read_text(path), stride=stride)
        figures = {"perplexity": out.perplexity, "bits_per_byte": out.bits_per_byte, "tokens": out.tokens}
        rows.append({"name": str(path), **figures, "bytes": out.bytes})
    for path in choices or ():
        rows.append({"name": str(path), **vars(evaluate_choices(lm, read_questions(path), shots=shots or 0))})
    if names:
        results = run_tasks(lm, names, include=include, shots=shots, limit=limit)
        for name, row in results.items():
            numbers = {k.removesuffix(",none"): v for k, v in row.items() if isinstance(v, float | int)}
            rows.append({"name": name, **numbers})
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    for row in rows:
        table = Table("figure", "value", title=row.pop("name"), title_justify="left")
        for key, value in row.items():
            table.add_row(key.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else f"{value:,}")
        Console(markup=False).print(table)

"""`landmark bench`: how fast something is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="How fast something is here.")


@app.callback()
def root() -> None:
    pass


@app.command()
def serve(
    url: Annotated[str, typer.Argument(help="Address of a server of OpenAI's protocol.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Which of its models; default: the first.")] = None,
    requests: Annotated[int, typer.Option(min=1)] = 100,
    rate: Annotated[float, typer.Option(help="Requests a second on average; inf sends all at once.")] = 4.0,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    shared: Annotated[int, typer.Option(min=0, help="Tokens that all prompts begin with.")] = 0,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    vocab: Annotated[int, typer.Option(min=2, help="Prompts are random ids below this.")] = 1000,
    seed: int = 0,
    key: Annotated[str | None, typer.Option(help="API key.", envvar="LANDMARK_API_KEY")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for load.json and load.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Send a server random requests that arrive at random; report the times to the first token and between tokens."""
    import asyncio

    import httpx
    from rich.console import Console
    from rich.table import Table

    from ..serve.load import Load, drive, summary, write

    load = Load(requests, rate, prompt, shared, answer, seed)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        listed = httpx.get(f"{url}/v1/models", headers=headers, timeout=10)
    except httpx.HTTPError as error:
        raise ValueError(
            f"no server answers at {url} ({type(error).__name__}); landmark serve MODEL starts one"
        ) from None
    if listed.status_code != 200:
        raise ValueError(f"the server at {url} answers {listed.status_code}: {listed.text[:200]}")
    name = model or listed.json()["data"][0]["id"]
    timings = asyncio.run(drive(url, name, load, vocab=vocab, key=key))
    report = summary(load, timings)
    if out is not None:
        write(out, report, timings)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = Table("", "mean", "p50", "p90", "p99", "max", title=f"{name}: milliseconds", title_justify="left", box=None)
    for kind in ("time_to_first_token_ms", "time_between_tokens_ms", "request_ms"):
        figures = report[kind]
        label = kind.removesuffix("_ms").replace("_", " ")
        table.add_row(label, *(f"{figures[column]:.1f}" for column in ("mean", "p50", "p90", "p99", "max") if figures))
    console = Console()
    console.print(table)
    console.print(
        f"{report['finished']} finished, {report['failed']} failed; {report['tokens_per_s']:.0f} tokens/s, "
        f"{report['requests_per_s']:.2f} requests/s"
    )
    for told in report["errors"]:
        console.print(told, style="red", markup=False)

"""`landmark bench`: how fast something is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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

    from ..serve.load import Load, drive, summary, write

    url = address(url)
    load = Load(requests, rate, prompt, shared, answer, seed)
    name = model or served(url, key)[0]
    timings = asyncio.run(drive(url, name, load, vocab=vocab, key=key))
    report = summary(load, timings)
    if out is not None:
        write(out, report, timings)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show_load(name, report)
    if not report["finished"]:
        raise typer.Exit(1)


def show_load(name: str, report: dict[str, Any]) -> None:
    """What a server was asked and how soon it answered, as tables."""
    from rich.console import Console
    from rich.table import Table

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


def address(url: str) -> str:
    """The address of a server, which its clients know with a /v1 behind it, and people without the http://."""
    return ("" if "://" in url else "http://") + url.rstrip("/").removesuffix("/v1")


def served(url: str, key: str | None) -> list[str]:
    """The models of a server. Raises ValueError where none answers."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        listed = httpx.get(f"{url}/v1/models", headers=headers, timeout=10)
    except httpx.HTTPError as error:
        raise ValueError(
            f"no server answers at {url} ({type(error).__name__}); landmark serve MODEL starts one"
        ) from None
    if listed.status_code != 200:
        raise ValueError(f"the server at {url} answers {listed.status_code}: {listed.text[:200]}")
    return [model["id"] for model in listed.json()["data"]]


@app.command()
def soak(
    models: Annotated[list[str] | None, typer.Argument(help="What to serve, as in landmark serve.")] = None,
    url: Annotated[str | None, typer.Option(help="A server that runs already, in place of MODELS.")] = None,
    model: Annotated[str | None, typer.Option(help="Which of its models; default: the first decoder.")] = None,
    minutes: Annotated[float, typer.Option(min=0.05)] = 10.0,
    clients: Annotated[int, typer.Option(min=1, help="At once.")] = 16,
    checked: Annotated[int, typer.Option(min=1, help="Answers that are compared with those given alone.")] = 200,
    memory: Annotated[float, typer.Option(help="GiB of the server's for state; little, so that it fills up.")] = 0.03,
    max_batch: Annotated[int, typer.Option(min=1, help="Of the server.")] = 64,
    dtype: Annotated[
        str, typer.Option(help="Of the server; rounded to fewer bits, batches change answers.")
    ] = "float32",
    draft: Annotated[str | None, typer.Option(help="Of the server.")] = None,
    seed: int = 0,
    key: Annotated[str | None, typer.Option(help="API key.", envvar="LANDMARK_API_KEY")] = None,
    out: Annotated[Path | None, typer.Option(help="A file for the report, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Minutes of mixed traffic: clients that ask, leave, dawdle and err. Fails where the server fails, answers wrongly,
    keeps anything or grows.

    landmark bench soak runs/quickstart --minutes 10
    """
    import asyncio
    from contextlib import nullcontext

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ..serve.soak import Soak, serving
    from ..serve.soak import soak as run
    from ..weights.files import beside

    if bool(models) == (url is not None):
        raise ValueError("give either models to serve, or the --url of a server that runs")
    if url is not None:
        url = address(url)
        served(url, key)
    wanted = Soak(minutes=minutes, clients=clients, checked=checked, seed=seed)
    options = ["--memory", str(memory), "--max-batch", str(max_batch), "--dtype", dtype]
    options += ["--draft", draft] if draft else []
    told = Console(stderr=True)
    with nullcontext(url) if url is not None else serving(models or [], options) as where:
        bar = Progress(BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"), console=told)
        with bar:
            task = bar.add_task("", total=60 * minutes)
            tell = lambda seconds, line: bar.update(task, completed=seconds, description=line)
            report = asyncio.run(run(where, wanted, model=model, key=key, tell=tell))
    if out is not None:
        with beside(out) as temporary:
            temporary.write_text(json.dumps(report, indent=2))
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show_soak(report)
    if not report["passed"]:
        raise typer.Exit(1)


def show_soak(report: dict[str, Any]) -> None:
    """The report of a soak as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    kinds = Table("requests", "", box=None)
    for name, count in report["requests"].items():
        kinds.add_row(name.replace("_", " "), str(count))
    console.print(kinds)
    memory, engine = report["memory_mib"], report["engine"]
    growth = "not told" if report["memory_growth"] is None else f"{report['memory_growth']:+.2%}"
    console.print(
        f"{report['requests_in_all']} requests; {engine['new_tokens']:.0f} tokens in {engine['steps']:.0f} steps, "
        f"{engine['cancelled']:.0f} cancelled, {engine['preempted']:.0f} preempted; {report['checked']} answers "
        f"checked, {report['by_rounding']} of them other by rounding"
    )
    rests = ", ".join(f"{rest:.1f}" for rest in memory["at_rest"])
    console.print(f"resident memory at rest {rests} MiB ({growth}); {memory['most']:.1f} at most")
    for criterion, met in report["criteria"].items():
        console.print(f"[{'green' if met else 'red'}]{'yes' if met else 'NO '}[/] {criterion}")
    for line in [*report["wrong"], *(f"{d['kind']} differs: {d['body']}" for d in report["differing"])]:
        console.print(line, style="red", markup=False)

"""`landmark serve`: models behind OpenAI's protocol, with a page to try them on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ..models.base import Model
    from ..models.decoder import Decoder
    from ..nn.lora import Adapters
    from ..serve.served import Served, ServedEncoder
    from ..weights.adapter import Adapter


def serve(
    models: Annotated[list[str], typer.Argument(help="Directories or hub ids; NAME=DIRECTORY names one.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A key that clients must send; several are allowed.", envvar="LANDMARK_API_KEY"),
    ] = None,
    memory: Annotated[float, typer.Option(min=0.001, help="GiB for the state of all sequences of a model.")] = 2.0,
    max_batch: Annotated[int, typer.Option(min=1, help="Sequences that are computed together.")] = 64,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of prompts that are read in one step.")] = 512,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get a 429.")] = 256,
    rate: Annotated[int | None, typer.Option(min=1, help="Requests a minute for each key or address.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 600.0,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests may still take on SIGTERM or Ctrl-C.")
    ] = 30.0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: as stored.")] = None,
    quantise: Annotated[
        str | None,
        typer.Option(
            help="Round the weights as they are loaded: int8, int4, int4-all, or one with -a8. bf16-11 rounds nothing: "
            "bfloat16 in 11 bits."
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Speculate, the answers stay the same: lookup (what followed the same words before), own (the model's "
            "own drafts), or a smaller model of the same vocabulary."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    reasoning: Annotated[
        Literal["auto", "none"],
        typer.Option(
            help="auto: where the model has such marks, <think>...</think> before an answer goes to reasoning_content; "
            "none: it stays where it is."
        ),
    ] = "auto",
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="A LoRA directory (PEFT), or NAME=DIRECTORY: one more model; several are allowed."),
    ] = None,
) -> None:
    """Serve models: /v1/chat/completions, /v1/completions, /v1/embeddings, and a page at /.

    landmark serve runs/quickstart
    """
    import socket

    from rich.console import Console

    from .. import malloc
    from ..ops.native import report
    from ..serve.app import create_app
    from ..serve.limits import Limits
    from ..serve.run import HttpServer
    from ..serve.served import ServedEncoder

    malloc.few_heaps()
    limits = Limits(keys=tuple(api_key or ()), timeout=timeout, drain=drain_seconds, queue=queue, rate=rate)
    console = Console(stderr=True, highlight=False)
    if adapter and len(models) > 1:
        raise ValueError(f"--adapter goes with one model, not with {len(models)}; serve the others apart")
    served: list[Served | ServedEncoder] = []
    for spec in models:
        with console.status(f"loading {spec}"):
            one = open_served(
                spec, dtype, quantise, device, int(memory * 2**30), max_batch, chunk, draft, adapter or (), reasoning
            )
            served += [one] if isinstance(one, ServedEncoder) else [one, *one.adapted()]
    if not all(isinstance(one, ServedEncoder) for one in served):
        console.print(f"[dim]{report()}[/]")
    app = create_app(served, limits)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # who comes as soon as the address is told waits a moment
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from None
    where = f"http://{host}:{listener.getsockname()[1]}"
    console.print(f"[bold]{', '.join(s.name for s in served)}[/] at {where} (the page) and {where}/v1 (the API)")
    if host not in ("127.0.0.1", "localhost", "::1") and not limits.keys:
        console.print("[yellow]Anyone who reaches this machine can use it; --api-key closes it.[/]")
    HttpServer(app).run(sockets=[listener])


def open_served(
    spec: str,
    dtype: str | None,
    quantise: str | None,
    device: str,
    memory: int,
    max_batch: int,
    chunk: int,
    draft: str | None = None,
    adapters: Sequence[str] = (),
    reasoning: Literal["auto", "none"] = "auto",
) -> Served | ServedEncoder:
    """A model with its engine and adapters, or an encoder of sentences."""
    import landmark

    from ..infer.engine import Engine
    from ..infer.sentences import SentenceEncoder
    from ..models.base import kind
    from ..models.decoder import Decoder
    from ..models.encoder import Encoder
    from ..serve.served import Served, ServedEncoder
    from ..transforms.quantise import quantised
    from ..weights.checkpoint import locate
    from ..weights.tokenizer import Tokenizer

    name, where = named(spec)
    directory = locate(where)
    model = landmark.load(directory, dtype=dtype, device=device)
    if isinstance(model, Encoder):
        if adapters:
            raise ValueError(f"{spec} is an encoder, which is served without adapters; leave --adapter out")
        return ServedEncoder(name, SentenceEncoder.load(str(directory), dtype=dtype, device=device))
    if quantise is not None:
        model = quantised(model, quantise)
    if not isinstance(model, Decoder):
        raise ValueError(f"{spec} is {kind(model)}, which is not served; give a decoder or a sentence encoder")
    tokenizer = Tokenizer.load(directory)
    attached = open_adapters(model, adapters)
    drafter = None if draft is None else open_draft(draft, dtype, device)
    warm(model)
    engine = Engine(
        model, tokenizer, memory=memory, max_batch=max_batch, chunk=chunk, drafter=drafter, adapters=attached
    )
    return Served(name, engine, tokenizer, reasoning=reasoning)


def warm(model: Decoder) -> None:
    """Read the weights once and have the kernels built, for which the first request would wait otherwise."""
    from ..infer.session import Session

    session = Session(model, 1, 8)
    session.extend([[0, 0, 0]])
    session.extend([[0]])


def open_draft(spec: str, dtype: str | None, device: str) -> Decoder | Literal["lookup", "own"]:
    """A way to draft, or the model that drafts."""
    if spec == "lookup" or spec == "own":
        return "lookup" if spec == "lookup" else "own"
    import landmark

    from ..models.base import kind
    from ..models.decoder import Decoder
    from ..weights.checkpoint import locate

    model = landmark.load(locate(spec), dtype=dtype, device=device)
    if not isinstance(model, Decoder):
        raise ValueError(f"{spec} is {kind(model)}, which cannot draft; give a decoder, or leave --draft out")
    return model


def named(spec: str) -> tuple[str, str]:
    """NAME=WHERE, or what is called as its folder or hub id is."""
    name, _, where = spec.rpartition("=")
    return name or (Path(where).resolve().name if Path(where).exists() else where), where


def open_adapters(model: Model, specs: Sequence[str]) -> Adapters | None:
    """Put adapters beside the weights of a model, in place."""
    if not specs:
        return None
    from ..transforms.lora import attach, read_adapter

    found: dict[str, Adapter] = {}
    for name, where in map(named, specs):
        if name in found:
            raise ValueError(f"two adapters are called {name!r}; give each a name of its own, as NAME=DIRECTORY")
        found[name] = read_adapter(where, model)
    return attach(model, found)

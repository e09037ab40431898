"""`landmark chat`: a conversation on the terminal."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..terminal import printable
from .generate import (
    Adapter,
    Device,
    Dtype,
    MaxTokens,
    MinP,
    Model,
    Quantise,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    open_model,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..infer.chat import Conversation

HELP = {
    "/reset": "forget the conversation",
    "/system [TEXT]": "set the system prompt, or remove it; forgets the conversation",
    "/save FILE": "write the conversation as JSON",
    "/help": "this list",
    "/exit": "leave; so does Ctrl-D",
    "Ctrl-C": "stop the answer",
    "\\": "at the end of a line: the message goes on in the next one",
}


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    dtype: Dtype = None,
    quantise: Quantise = None,
    device: Device = "cpu",
    adapter: Adapter = None,
) -> None:
    """Talk with a model. Type /help for commands."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    with console.status(escape(f"loading {model}")):
        loaded, tokenizer = open_model(model, dtype, device, quantise, adapter)
        from ..infer.chat import Conversation
        from ..infer.defaults import recommended
        from ..models.base import kind
        from ..models.decoder import Decoder
    if not isinstance(loaded, Decoder):
        raise ValueError(f"{model} is {kind(loaded)} and does not chat; try landmark generate")
    sampling = recommended(
        loaded, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop) if stop else None,
    )  # fmt: skip
    conversation = Conversation(loaded, tokenizer, sampling, system)
    console.print(f"[bold]{escape(Path(model).resolve().name)}[/]  [dim]/help for commands, Ctrl-D to leave[/]")
    if not conversation.templated:
        console.print("[yellow]This model has no chat template: it continues your text, line by line.[/]")
    for line in read(console):
        if line.startswith("/"):
            if not command(console, conversation, line):
                break
        elif line.strip():
            answer(console, conversation, line)


def read(console: Console) -> Iterator[str]:
    """Messages, until the end of the input."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 - gives input() its history and its keys
    coloured = console.color_system is not None and not console.no_color
    sign = "\1\033[1;36m\2>\1\033[0m\2 " if coloured else "> "  # \1, \2: readline, what is between takes no room
    message: list[str] = []
    while True:
        prompt = ("  " if message else sign) if terminal else ""
        try:
            line = input(prompt)
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            message.clear()
            note(console, "\n/exit or Ctrl-D leaves")
            continue
        message.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(message)
            message.clear()


def command(console: Console, conversation: Conversation, line: str) -> bool:
    """Do what a line that begins with / says; False to leave."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    match name:
        case "/exit" | "/quit":
            return False
        case "/reset":
            conversation.reset()
            note(console, "a new conversation")
        case "/system":
            conversation.reset()
            conversation.system = rest or None
            note(console, f"a new conversation, {'with' if rest else 'without'} a system prompt")
        case "/save":
            save(console, conversation, rest)
        case "/help":
            for key, meaning in HELP.items():
                note(console, f"  {key:<16} {meaning}", "default")
        case _:
            note(console, f"{name} is no command; /help lists them", "red")
    return True


def save(console: Console, conversation: Conversation, name: str) -> None:
    from ..weights.files import write_json

    path = Path(name).expanduser()
    if not name or path.exists():
        note(console, f"{f'{name} exists' if name else '/save needs a name'}; give a new file's name", "red")
        return
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    try:
        write_json(path, {"messages": [*system, *conversation.messages]})
    except OSError as error:
        note(console, f"cannot write {path}: {error.strerror}", "red")
    else:
        note(console, f"{len(conversation.messages)} messages in {path}")


def answer(console: Console, conversation: Conversation, text: str) -> None:
    """Stream the model's answer; Ctrl-C ends it."""
    forgotten, count, began, first = conversation.forgotten, 0, time.perf_counter(), 0.0
    with interruptible() as interrupted:
        try:
            for event in conversation.reply(text):
                first = first or time.perf_counter()
                count += 1
                print(printable(event.text), end="", flush=True)
                if interrupted():
                    break
        except ValueError as error:
            note(console, str(error), "red")
            return
        except KeyboardInterrupt:  # a second one, in the middle of a step
            pass
        seconds = time.perf_counter() - first
    print()
    if not console.is_terminal:
        return
    notes = [f"{count} tokens"]
    notes += [f"{(count - 1) / seconds:.1f} tokens/s"] if count > 1 else []
    notes += [f"the first after {first - began:.1f} s"] if first - began > 1 else []
    notes += ["stopped"] if interrupted() else []
    if conversation.forgotten > forgotten:
        notes.append(f"the oldest {conversation.forgotten} messages no longer fit the context")
    note(console, ", ".join(notes) + "\n")


def note(console: Console, text: str, style: str = "dim") -> None:
    console.print(text, style=style, markup=False)


@contextmanager
def interruptible() -> Iterator[Any]:
    """Inside, the first Ctrl-C only makes what is yielded return True; a second one interrupts."""
    count = 0

    def press(*_: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)

"""The command `landmark`: a table of subcommands, each imported when it is asked for."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from ..terminal import settle

COMMANDS = (
    "quickstart",
    "train",
    "generate",
    "chat",
    "serve",
    "bench",
    "inspect",
    "transform",
    "convert",
    "eval",
    "embed",
    "data",
    "papers",
    "reproduce",
)

# What the help of a command ends with, where it shows no example of its own.
EXAMPLES = {
    "quickstart": "landmark quickstart --steps 200 --out runs/short",
    "train": "landmark train examples/llama.toml --set steps=1000 --set optimizer.lr=1e-3",
    "chat": "landmark chat runs/quickstart --system 'You answer in one line.'",
    "bench serve": "landmark bench serve http://127.0.0.1:8000 --requests 200 --rate 8",
    "transform": "landmark transform runs/quickstart runs/longer --rope yarn --factor 4",
    "convert": "landmark convert RWKV-x070-World-0.1B.pth runs/rwkv7",
    "eval": "landmark eval runs/quickstart --text README.md",
    "embed": "landmark embed sentence-transformers/all-MiniLM-L6-v2 --text 'a cat' --text 'a dog'",
    "data train-tokenizer": "landmark data train-tokenizer 'text/*.md' --out runs/tokenizer --vocab-size 8192",
    "data tokenize": "landmark data tokenize 'text/*.md' --tokenizer runs/tokenizer --out runs/shards",
    "data info": "landmark data info runs/shards",
    "papers": "landmark papers state space",
    "papers search": "landmark papers search attention --year 2023",
    "papers show": "landmark papers show rope --lang ja",
    "papers graph": "landmark papers graph mamba",
    "papers essentials": "landmark papers essentials --newcomers",
    "papers groups": "landmark papers groups",
    "papers models": "landmark papers models",
    "reproduce": "landmark reproduce F1 --quick",
}

# Options that name a file or a folder, whatever the command; others may be text, in which ~ is a character.
PATHS = ("--out", "--output", "--file", "--tokenizer", "--choices", "--include", "--adapter", "--draft", "--model")


class Commands(TyperGroup):
    """Subcommand `x` lives in landmark/cli/x.py, as a typer app `app` or as a function `x`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands: dict[str, Any] = dict.fromkeys(COMMANDS)  # the names, for those that are mistyped

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in COMMANDS:
            return None
        module = import_module(f"landmark.cli.{name}")
        app = getattr(module, "app", None)
        if app is None:
            app = typer.Typer(add_completion=False)
            app.command(name)(getattr(module, "eval_" if name == "eval" else name))
        command = typer.main.get_command(app)
        command.name = name
        return documented(command, name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer would say nothing
            print(f"landmark: {str(error) or 'interrupted'}", file=sys.stderr)
            raise typer.Exit(130) from None


def documented(command: Any, path: str) -> Any:
    """The command, and those below it, with an example, and with help whose paragraphs fill the terminal."""
    if command.help:
        command.help = "\n\n".join(escape(" ".join(part.split())) for part in command.help.split("\n\n"))
    if path in EXAMPLES:
        command.epilog = f"Example: {escape(EXAMPLES[path])}"
    for name, below in getattr(command, "commands", {}).items():
        documented(below, f"{path} {name}")
    return command


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The landmark papers of the LLM era as one working system.",
)


def version(value: bool) -> None:
    if value:
        from landmark import __version__

        print(f"landmark {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=version, is_eager=True, help="Print the version."),
) -> None:
    pass


def at_home(argument: str) -> str:
    """--out=~/runs as the shell reads --out ~/runs: it leaves the former alone, and a folder ~ would be made."""
    option, equals, value = argument.partition("=")
    return option + equals + os.path.expanduser(value) if option in PATHS else argument


def main() -> None:
    """Run the command line; bad input is one clear line on stderr and exit code 2, a warning is one too."""
    settle()
    sys.argv[1:] = map(at_home, sys.argv[1:])
    warnings.formatwarning = lambda message, *_, **__: f"landmark: {' '.join(str(message).split())}\n"
    try:
        app()
    except (ValueError, OSError) as error:
        told = str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            told = f"{error.filename}: {error.strerror}"
        print(f"landmark: {' '.join(told.split())}", file=sys.stderr)
        sys.exit(2)
    except ArithmeticError as error:  # a run that diverged
        print(f"landmark: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if not any(said in str(error) for said in ("out of memory", "can't allocate memory")):
            raise
        told = " ".join(str(error).split())
        print(
            f"landmark: not enough memory ({told}); less of it is asked for with --quantise or --dtype", file=sys.stderr
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

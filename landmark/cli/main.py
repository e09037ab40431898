"""The command `landmark`: a table of subcommands, each imported when it is asked for."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

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


class Commands(TyperGroup):
    """Subcommand `x` lives in landmark/cli/x.py, as a typer app `app` or as a function `x`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in COMMANDS:
            return None
        module = import_module(f"landmark.cli.{name}")
        app = getattr(module, "app", None)
        if app is None:
            app = typer.Typer()
            app.command(name)(getattr(module, "eval_" if name == "eval" else name))
        command = typer.main.get_command(app)
        command.name = name
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # typer would say nothing
            print(f"landmark: {str(error) or 'interrupted'}", file=sys.stderr)
            raise typer.Exit(130) from None


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


def main() -> None:
    """Run the command line; bad input is one clear line on stderr and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"landmark: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except ArithmeticError as error:  # a run that diverged
        print(f"landmark: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

"""`landmark data`: train a tokenizer, tokenise a corpus into shards, look at shards."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..data.corpora import Corpus

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Tokenizers and tokenised corpora.")


class Kind(StrEnum):
    bpe = "bpe"
    wordpiece = "wordpiece"
    unigram = "unigram"


class Side(StrEnum):
    text = "text"
    target = "target"


class Part(StrEnum):
    all = "all"
    train = "train"
    held_out = "held-out"


Sources = Annotated[
    list[str],
    typer.Argument(help="embedded; gettext:LANGUAGE; hf:ID[:CONFIG]; or files, folders and patterns."),
]
Text = Annotated[str, typer.Option(help="Field with the text (JSON lines, Parquet, datasets).")]
Target = Annotated[str | None, typer.Option(help="Field with the translation, for parallel text.")]
Separator = Annotated[str | None, typer.Option(help=r"What separates documents inside a text file; \n is a line feed.")]
Split = Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")]
PartOption = Annotated[Part, typer.Option(help="Use only this part of the corpus.")]
HeldOut = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the documents that is held out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("train-tokenizer")
def train_tokenizer(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Number of tokens.")] = 8192,
    kind: Annotated[Kind, typer.Option(help="Byte-level BPE, BERT's WordPiece, or Unigram.")] = Kind.bpe,
    lowercase: Annotated[bool, typer.Option(help="WordPiece: without case and accents.")] = True,
    text: Text = "text",
    target: Target = None,
    separator: Separator = None,
    split: Split = "train",
    part: PartOption = Part.train,
    held_out: HeldOut = 0.05,
    as_json: AsJson = False,
) -> None:
    """Train a tokenizer on a corpus and save it as transformers loads it."""
    from ..weights import tokenizer_train
    from ..weights.files import check_new, new_directory

    check_new(out)
    corpus = _corpus(sources, text, target, separator, split, part, held_out)
    tokenizer = tokenizer_train.train_tokenizer(
        kind.value, corpus.texts(), vocab_size, lowercase=lowercase, progress=not as_json and sys.stderr.isatty()
    )
    with new_directory(out) as fresh:
        tokenizer.save(fresh)
    figures = {
        "folder": str(out),
        "kind": kind.value,
        "corpus": corpus.describe(),
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": tokenizer.special_tokens,
        "fingerprint": tokenizer.fingerprint,
    }
    _print(figures, as_json)


@app.command()
def tokenize(
    sources: Sources,
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer: a folder or a vocabulary file.")],
    out: Annotated[Path, typer.Option(help="Folder of shards to write.")],
    bos: Annotated[bool, typer.Option("--bos", help="Begin each document with the tokenizer's bos.")] = False,
    side: Annotated[Side, typer.Option(help="Which text of a pair.")] = Side.text,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens a shard.")] = 1 << 25,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other shards in the folder.")] = False,
    text: Text = "text",
    target: Target = None,
    separator: Separator = None,
    split: Split = "train",
    part: PartOption = Part.all,
    held_out: HeldOut = 0.05,
    as_json: AsJson = False,
) -> None:
    """Tokenise a corpus once, into memory-mapped shards. Stopped, the same command goes on where it was."""
    from ..data.shards import write_shards
    from ..weights.tokenizer import Tokenizer

    corpus = _corpus(sources, text, target, separator, split, part, held_out)
    try:
        shards = write_shards(
            corpus,
            Tokenizer.load(tokenizer),
            out,
            side=side.value,
            bos=bos,
            shard_tokens=shard_tokens,
            progress=not as_json,
            overwrite=overwrite,
        )
    except KeyboardInterrupt:
        print("landmark: stopped; the same command (without --overwrite) goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    _print(shards.info(), as_json)


@app.command()
def info(
    folder: Annotated[Path, typer.Argument(help="Folder of shards.")],
    as_json: AsJson = False,
) -> None:
    """Documents, tokens and bytes of a tokenised corpus."""
    from ..data.shards import Shards

    _print(Shards(folder).info(), as_json)


def _corpus(
    sources: list[str], text: str, target: str | None, separator: str | None, split: str, part: Part, held_out: float
) -> Corpus:
    from ..data.corpora import open_corpus

    source: str | list[str] = sources[0] if len(sources) == 1 else sources
    if separator is not None:
        try:
            separator = separator.encode("latin-1", "backslashreplace").decode("unicode_escape")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--separator {separator!r}: {error.reason}; \\n is a line feed, \\\\ a backslash"
            ) from None
        if not separator:
            raise ValueError("--separator is empty; give what stands between two documents, such as '\\n\\n'")
    corpus = open_corpus(source, text=text, target=target, separator=separator, split=split)
    return corpus if part is Part.all else corpus.split(held_out)[part is Part.held_out]


def _print(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for key, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {_number(item)}" for name, item in value.items())
        table.add_row(key.replace("_", " "), _number(value))
    Console(markup=False).print(table)


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"

"""`landmark papers`: search the catalogue, show a paper, draw the lineage. It needs no torch."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from typer.core import TyperGroup

from ..papers.catalogue import Catalogue, GraphFormat, Lang, Paper, Text, Theme, load

VALUED = ("--lang", "--theme", "--year", "--format")  # options that take a value
WIDE = "\u3000-\u9fff\uff00-\uffef"  # kana, kanji, full-width forms: lines may break between any two


class Papers(TyperGroup):
    """A group whose default command is `search`, so that `landmark papers state space` searches. Options may stand
    before the subcommand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] == ["--help"]:
            return super().parse_args(ctx, args)
        first = 0
        while first < len(args) and args[first].startswith("-"):
            first += 2 if args[first] in VALUED else 1
        if first < len(args) and args[first] in self.commands:
            return super().parse_args(ctx, [args[first], *args[:first], *args[first + 1 :]])
        return super().parse_args(ctx, ["search", *args])


app = typer.Typer(
    cls=Papers,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The catalogue of papers. Without a command it searches: landmark papers, landmark papers state space.",
)

Language = Annotated[Lang, typer.Option("--lang", help="Language of the contributions.")]
ThemeName = Annotated[str | None, typer.Option("--theme", help="Only this theme, such as scaling.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def search(
    query: Annotated[list[str] | None, typer.Argument(help="Words; none lists everything.")] = None,
    theme: ThemeName = None,
    year: Annotated[int | None, typer.Option(help="Only this year.")] = None,
    lang: Language = Lang.en,
    as_json: AsJson = False,
) -> None:
    """List the papers that match, best first (the default command)."""
    catalogue = load()
    words = " ".join(query or ())
    papers = catalogue.search(words, theme, year)
    if as_json:
        _print_json([_record(catalogue, paper) for paper in papers])
        return
    console = Console()
    if not papers:
        console.print("no paper matches; `landmark papers` lists them all", highlight=False)
        return
    sections = [None] if words else catalogue.themes
    for section in sections:
        _print_table(console, [p for p in papers if section is None or p.theme == section.id], section, lang)
    done = sum(paper.status == "implemented" for paper in papers)
    count = "1 paper" if len(papers) == 1 else f"{len(papers)} papers"
    console.print(f"{count}, {done} implemented ([green]●[/]). Next: landmark papers show {papers[0].id}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="ID", help="An id, an arXiv number or a title.")],
    lang: Language = Lang.en,
    as_json: AsJson = False,
) -> None:
    """Show one paper: what it contributed, what it builds on, where it is implemented."""
    catalogue = load()
    paper = catalogue.show(name)
    if as_json:
        _print_json(_record(catalogue, paper))
        return
    theme = catalogue.theme(paper.theme).name[lang]
    console = Console(highlight=False)
    console.print(f"[bold]{escape(paper.title)}[/]")
    console.print(escape(", ".join(paper.authors)))
    console.print(f"[dim]{paper.date} · {theme} · {paper.url}[/]\n", soft_wrap=True)
    console.print(_paragraph(paper, lang, console.width) + "\n")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    if paper.id in catalogue.essentials:
        facts.add_row("essential", f"{catalogue.essentials.index(paper.id) + 1} of {len(catalogue.essentials)}")
    for label, values in (
        ("roadmap", paper.rows),
        ("builds on", paper.builds_on),
        ("leads to", [child.id for child in catalogue.children(paper.id)]),
        ("module", paper.module),
        ("evidence", paper.evidence),
    ):
        if values:
            facts.add_row(label, escape(", ".join(values)))
    facts.add_row("status", f"{_mark(paper)} {paper.status}")
    console.print(facts)


@app.command()
def graph(
    name: Annotated[str | None, typer.Argument(metavar="ID", help="Only this paper's ancestry and progeny.")] = None,
    format: Annotated[GraphFormat, typer.Option(help="text, mermaid or dot (Graphviz).")] = GraphFormat.text,
    theme: ThemeName = None,
    lang: Language = Lang.en,
    as_json: AsJson = False,
) -> None:
    """Print the lineage: who builds on whom."""
    catalogue = load()
    text = catalogue.graph(format, name, theme, lang)
    if not as_json:
        print(text)
        return
    papers = catalogue.lineage(name, theme)
    kept = {paper.id for paper in papers}
    edges = [[old, paper.id] for paper in papers for old in paper.builds_on if old in kept]
    _print_json({"papers": [paper.id for paper in papers], "edges": edges})


@app.command()
def essentials(
    newcomers: Annotated[bool, typer.Option("--newcomers", help="The shorter dozen.")] = False,
    lang: Language = Lang.en,
    as_json: AsJson = False,
) -> None:
    """List the essentials in the order of the field's history, or the dozen for newcomers."""
    catalogue = load()
    papers = [catalogue.by_id[name] for name in (catalogue.newcomers if newcomers else catalogue.essentials)]
    if as_json:
        _print_json([_record(catalogue, paper) for paper in papers])
        return
    console = Console(highlight=False)
    for number, paper in enumerate(papers, 1):
        console.print(f"{number:2}  {_mark(paper)} {paper.id} [dim]{escape(paper.byline)} {paper.year}[/]")
        body = f"[bold]{escape(paper.title)}[/]\n{_paragraph(paper, lang, console.width - 4)}"
        console.print(Padding(body, (0, 0, 1, 4)))


@app.command()
def groups(lang: Language = Lang.en, as_json: AsJson = False) -> None:
    """List reading groups in Korea, Japan and elsewhere."""
    catalogue = load()
    if as_json:
        _print_json([asdict(group) for group in catalogue.groups])
        return
    console = Console(highlight=False)
    for region in dict.fromkeys(group.region for group in catalogue.groups):
        console.print(f"[bold]{region.capitalize()}[/]")
        for group in catalogue.groups:
            if group.region == region:
                console.print(f"  {escape(group.name)}  [dim]{group.url}[/]", soft_wrap=True)
                console.print(Padding(escape(_broken(group.about, lang, console.width - 4)), (0, 0, 0, 4)))
        console.print()


@app.command()
def models(as_json: AsJson = False) -> None:
    """Show the architecture facts of well-known models; estimates are marked as such."""
    catalogue = load()
    if as_json:
        _print_json([asdict(model) for model in catalogue.models])
        return
    columns = ("released", "total", "active", "attention", "positions", "context")
    table = Table("model", "date", *columns[1:], box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = True
    for model in catalogue.models:
        cells = [model.cell(column) for column in columns]
        cells = [cell if cell != cells[i] or cell != "undisclosed" else "" for i, cell in enumerate(cells[1:])]
        table.add_row(model.name, model.released, *cells)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "\nFour numbers describe a model today: active parameters, FLOPs per token, cache bytes per token, test-time"
        " compute.\n`landmark inspect` counts the first three for any model with a published configuration."
    )


def _print_table(console: Console, papers: list[Paper], theme: Theme | None, lang: Lang) -> None:
    if not papers:
        return
    title = f"[bold]{theme.name[lang]}[/] [dim]{theme.id}[/]" if theme else None
    table = Table(title=title, title_justify="left", title_style="", box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True, style="dim")
    for paper in papers:
        table.add_row(_mark(paper), paper.id, str(paper.year), escape(paper.title), escape(paper.byline))
    console.print(table, "")


def _mark(paper: Paper) -> str:
    return "[green]●[/]" if paper.status == "implemented" else "[dim]○[/]"


def _record(catalogue: Catalogue, paper: Paper) -> dict[str, Any]:
    """A paper as JSON: its fields, and what follows from them."""
    order = catalogue.essentials
    return {
        **asdict(paper),
        "status": paper.status,
        "arxiv": paper.arxiv,
        "essential": order.index(paper.id) + 1 if paper.id in order else None,
        "leads_to": [child.id for child in catalogue.children(paper.id)],
    }


def _paragraph(paper: Paper, lang: Lang, width: int) -> str:
    return escape(_broken(paper.contribution, lang, width))


def _broken(text: Text, lang: Lang, width: int) -> str:
    """The text in one language. Rich breaks lines at spaces only, so Japanese is broken into lines here."""
    if lang is not Lang.ja:
        return text[lang]
    lines = [""]
    for piece in re.findall(rf"[「（]*(?:[^{WIDE}\s]+|\S)[、。」）]*\s*", text.ja):
        if cell_len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))

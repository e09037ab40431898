"""The catalogue of papers: typed records of `catalogue.toml`, search, and the lineage graph. Standard library only."""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from functools import cache, cached_property
from importlib.resources import files
from typing import Any


class Lang(StrEnum):
    """The languages that the catalogue is written in."""

    en = "en"
    ja = "ja"
    ko = "ko"


class GraphFormat(StrEnum):
    """Ways to write the lineage: lines by year, a Mermaid flowchart, a Graphviz digraph."""

    text = "text"
    mermaid = "mermaid"
    dot = "dot"


@dataclass(frozen=True)
class Text:
    """One text in English, Japanese and Korean."""

    en: str
    ja: str
    ko: str

    def __getitem__(self, lang: Lang) -> str:
        return str(getattr(self, lang))

    def __str__(self) -> str:
        return "\n".join((self.en, self.ja, self.ko))


@dataclass(frozen=True)
class Theme:
    """A current of the field."""

    id: str
    name: Text


@dataclass(frozen=True)
class Paper:
    """A paper, report or system. `rows` are roadmap ids, `builds_on` ids of older papers; the names left out of
    `authors` are its last entry, "et al."."""

    id: str
    rows: tuple[str, ...]
    title: str
    authors: tuple[str, ...]
    year: int
    month: int
    theme: str
    url: str
    builds_on: tuple[str, ...]
    module: tuple[str, ...]
    evidence: tuple[str, ...]
    contribution: Text

    @property
    def date(self) -> str:
        return f"{self.year}-{self.month:02}"

    @property
    def status(self) -> str:
        """`implemented` where a module implements the paper and evidence shows it, else `planned`."""
        return "implemented" if self.module and self.evidence else "planned"

    @property
    def arxiv(self) -> str | None:
        """The arXiv number, if the paper is there."""
        match = re.fullmatch(r"https://arxiv\.org/abs/(\d{4}\.\d{4,5})", self.url)
        return match and match[1]

    @property
    def byline(self) -> str:
        """Authors as a citation names them: "Gu and Dao", "Vaswani et al."; teams and lone authors in full."""
        first, *others = self.authors
        if not others or "Team" in first:
            return first
        surnames = [name.split()[-1] for name in self.authors[:2]]
        return " and ".join(surnames) if len(others) == 1 else f"{surnames[0]} et al."


@dataclass(frozen=True)
class ReadingGroup:
    """Where papers are read together. `region` is korea, japan or elsewhere."""

    name: str
    region: str
    url: str
    about: Text


@dataclass(frozen=True)
class ModelFact:
    """A row of the architecture facts. `total` and `active` count parameters; None is undisclosed (for `context`: not
    stated); the columns named in `estimated` hold outside estimates."""

    name: str
    released: str
    paper: str | None = None
    total: float | None = None
    active: float | None = None
    attention: str | None = None
    positions: str | None = None
    context: str | None = None
    estimated: tuple[str, ...] = ()

    def cell(self, column: str) -> str:
        """One column as people read it, estimates marked as such."""
        value = getattr(self, column)
        if value is None:
            return "-" if column == "context" else "undisclosed"
        text = _amount(value) if isinstance(value, float) else str(value)
        return f"~{text} (estimate)" if column in self.estimated else text


@dataclass(frozen=True)
class Catalogue:
    """All papers in the order of the file (by theme), and what else the file holds."""

    papers: tuple[Paper, ...]
    themes: tuple[Theme, ...]
    essentials: tuple[str, ...]
    newcomers: tuple[str, ...]
    groups: tuple[ReadingGroup, ...]
    models: tuple[ModelFact, ...]

    @cached_property
    def by_id(self) -> dict[str, Paper]:
        return {paper.id: paper for paper in self.papers}

    @cached_property
    def _children(self) -> dict[str, list[str]]:
        children: dict[str, list[str]] = {paper.id: [] for paper in self.papers}
        for paper in self.papers:
            for parent in paper.builds_on:
                children[parent].append(paper.id)
        return children

    def show(self, name: str) -> Paper:
        """The paper with this id, arXiv number or title; case and punctuation do not matter.

        Raises:
            ValueError: no such paper; the message names the nearest ids.
        """
        if name in self.by_id:
            return self.by_id[name]
        for paper in self.papers:
            if _exact(name, paper):
                return paper
        near = get_close_matches(_fold(name), self.by_id, n=3, cutoff=0.5) or [p.id for p in self.search(name)[:3]]
        mend = f"did you mean {' or '.join(near)}?" if near else "`landmark papers` lists them all"
        raise ValueError(f"no paper {name!r} in the catalogue; {mend}")

    def theme(self, name: str) -> Theme:
        """The theme with this id.

        Raises:
            ValueError: no such theme; the message lists them.
        """
        for theme in self.themes:
            if theme.id == name:
                return theme
        raise ValueError(f"no theme {name!r}; the themes are {', '.join(theme.id for theme in self.themes)}")

    def search(self, query: str = "", theme: str | None = None, year: int | None = None) -> list[Paper]:
        """The papers in which every word of `query` occurs, best first.

        A paper whose id, title or arXiv number is the query comes first; then words found in ids and titles, in
        authors, in theme, year and roadmap rows, and in the contributions in any language. Words match at their start,
        words with a digit as a whole. An empty query matches everything, in the order of the file.
        """
        themes = {t.id: t for t in self.themes}
        if theme is not None:
            self.theme(theme)
        papers = [p for p in self.papers if theme in (None, p.theme) and year in (None, p.year)]
        words = re.findall(r"[^\W_]+", _fold(query))
        if not words:
            return papers if not query.strip() else []
        ranked = []
        for paper in papers:
            facets = " ".join((*paper.rows, str(paper.year), paper.theme, str(themes[paper.theme].name)))
            text = " ".join((str(paper.contribution), *paper.module, paper.url))
            fields = [_fold(field) for field in (f"{paper.id} {paper.title}", " ".join(paper.authors), facets, text)]
            tiers = [_tier(word, fields) for word in words]
            if _exact(query, paper):
                tiers = [0]
            if None not in tiers:
                found = [tier for tier in tiers if tier is not None]
                phrase = " ".join(words) in fields[0].replace("-", " ")
                ranked.append((max(found), sum(found), not phrase, paper.date, paper.id))
        return [self.by_id[key[-1]] for key in sorted(ranked)]

    def ancestors(self, name: str) -> list[Paper]:
        """All that a paper builds on, directly or not, oldest first."""
        return self._reach(name, {paper.id: paper.builds_on for paper in self.papers})

    def descendants(self, name: str) -> list[Paper]:
        """All that builds on a paper, directly or not, oldest first."""
        return self._reach(name, self._children)

    def children(self, name: str) -> list[Paper]:
        """What builds on a paper directly, oldest first."""
        return sorted((self.by_id[i] for i in self._children[self.show(name).id]), key=lambda p: (p.date, p.id))

    def _reach(self, name: str, edges: Any) -> list[Paper]:
        seen: set[str] = set()
        todo = list(edges[self.show(name).id])
        while todo:
            if (one := todo.pop()) not in seen:
                seen.add(one)
                todo.extend(edges[one])
        return sorted((self.by_id[i] for i in seen), key=lambda p: (p.date, p.id))

    def lineage(self, name: str | None = None, theme: str | None = None) -> list[Paper]:
        """The papers of a graph, oldest first: everything, or one paper with its ancestors and descendants; of one
        theme, if given."""
        if name is None:
            papers = list(self.papers)
        else:
            papers = [self.show(name), *self.ancestors(name), *self.descendants(name)]
        return sorted((p for p in papers if theme in (None, p.theme)), key=lambda p: (p.date, p.id))

    def graph(
        self,
        format: GraphFormat | str = GraphFormat.text,
        name: str | None = None,
        theme: str | None = None,
        lang: Lang = Lang.en,
    ) -> str:
        """The lineage, `lineage(name, theme)`, written as text, Mermaid or Graphviz. Edges run from older to newer."""
        if theme is not None:
            self.theme(theme)
        papers = self.lineage(name, theme)
        kept = {paper.id for paper in papers}
        edges = [(parent, paper.id) for paper in papers for parent in paper.builds_on if parent in kept]
        match GraphFormat(format):
            case GraphFormat.mermaid:
                return _mermaid(papers, edges, self.themes, lang)
            case GraphFormat.dot:
                nodes = [f'  "{paper.id}" [label="{paper.id}\\n{paper.year}"];' for paper in papers]
                arrows = [f'  "{old}" -> "{new}";' for old, new in edges]
                return "\n".join(["digraph lineage {", "  rankdir=LR;", "  node [shape=box];", *nodes, *arrows, "}"])
            case GraphFormat.text:
                width = max((len(paper.id) for paper in papers), default=0)
                lines = []
                for paper in papers:
                    parents = ", ".join(parent for parent in paper.builds_on if parent in kept)
                    lines.append(f"{paper.date}  {paper.id:{width}}{' <- ' if parents else ''}{parents}".rstrip())
                return "\n".join(lines)


@cache
def load() -> Catalogue:
    """The catalogue, read once."""
    data = tomllib.loads(files(__package__).joinpath("catalogue.toml").read_text(encoding="utf-8"))
    return Catalogue(
        papers=tuple(_record(Paper, "contribution", row) for row in data["paper"]),
        themes=tuple(_record(Theme, "name", row) for row in data["theme"]),
        essentials=tuple(data["essentials"]),
        newcomers=tuple(data["newcomers"]),
        groups=tuple(_record(ReadingGroup, "about", row) for row in data["group"]),
        models=tuple(_record(ModelFact, None, row) for row in data["model"]),
    )


def _record(cls: type[Any], text: str | None, row: dict[str, Any]) -> Any:
    """A record from a table of the file: lists become tuples, `en`, `ja` and `ko` the field named `text`."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    if text is not None:
        fields[text] = Text(fields.pop("en"), fields.pop("ja"), fields.pop("ko"))
    return cls(**fields)


_PLAIN = {code: unicodedata.normalize("NFKD", chr(code))[0] for code in range(0xC0, 0x250)} | {0x142: "l", 0xF8: "o"}


def _fold(text: str) -> str:
    """Text as search compares it: lower case, full-width forms made ordinary, Latin letters without accents."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_PLAIN)


def _bare(text: str) -> str:
    return "".join(re.findall(r"[^\W_]+", _fold(text)))


def _exact(query: str, paper: Paper) -> bool:
    return bool(_bare(query)) and (_bare(query) in (_bare(paper.id), _bare(paper.title)) or query == paper.arxiv)


def _tier(word: str, fields: Iterable[str]) -> int | None:
    """Which field a word occurs in first, from 1. Japanese and Korean words match anywhere: they run together."""
    end = r"\b" if any(c.isdigit() for c in word) else ""
    pattern = re.compile(rf"\b{re.escape(word)}{end}" if word.isascii() else re.escape(word), re.ASCII)
    return next((tier for tier, field in enumerate(fields, 1) if pattern.search(field)), None)


def _mermaid(papers: list[Paper], edges: list[tuple[str, str]], themes: tuple[Theme, ...], lang: Lang) -> str:
    def node(name: str) -> str:
        return "p_" + re.sub(r"\W", "_", name)

    lines = ["graph LR"]
    for theme in themes:
        members = [paper for paper in papers if paper.theme == theme.id]
        if members:
            lines.append(f'  subgraph {theme.id}["{theme.name[lang]}"]')
            lines += [f'    {node(paper.id)}["{paper.id}<br/>{paper.year}"]' for paper in members]
            lines.append("  end")
    return "\n".join([*lines, *(f"  {node(old)} --> {node(new)}" for old, new in edges)])


def _amount(number: float) -> str:
    unit, letter = (1e12, "T") if number >= 1e12 else (1e9, "B")
    return f"{number / unit:g}{letter}"

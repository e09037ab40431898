"""Corpora: iterables of documents, read as a stream, in the same order each time."""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import json
import os
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from . import catalogues

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Document:
    """A text, or with `target` a pair of texts that say the same (source and translation).  `name` is its own
    within the corpus and does not change between runs."""

    text: str
    name: str
    target: str | None = None


class Corpus(ABC):
    """An iterable of documents.  Documents without any text are left out; a corpus without any document is a
    ValueError, as is text that is not UTF-8 or holds NUL bytes."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """The documents as they are found, blank ones too."""

    @abstractmethod
    def describe(self) -> str:
        """What this is, for messages."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the documents do (of files: their names, sizes and times)."""

    @property
    def size(self) -> int | None:
        """Bytes of text, about, when that is known without reading: for progress bars."""
        return None

    def __iter__(self) -> Iterator[Document]:
        empty = True
        for document in self.documents():
            if document.text.strip() and (document.target is None or document.target.strip()):
                empty = False
                yield document
        if empty:
            raise ValueError(f"{self.describe()} holds no text; give a corpus with at least one document")

    def texts(self) -> Iterator[str]:
        """All texts, of pairs both: what a tokenizer is trained on."""
        for document in self:
            yield document.text
            if document.target is not None:
                yield document.target

    def split(self, held_out: float = 0.05) -> tuple[Corpus, Corpus]:
        """The training part and the held-out part.  The hash of its name puts a document into one, so that documents
        that are added or removed do not move others."""
        return Part(self, "train", held_out), Part(self, "held-out", held_out)


@dataclass(frozen=True)
class Part(Corpus):
    """One part of a corpus; see `Corpus.split`."""

    corpus: Corpus
    part: Literal["train", "held-out"]
    held_out: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held-out fraction {self.held_out}: give a number between 0 and 1")

    def documents(self) -> Iterator[Document]:
        for document in self.corpus:
            share = int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:6], "big") / (1 << 48)
            if (share < self.held_out) == (self.part == "held-out"):
                yield document

    @property
    def size(self) -> int | None:
        share = self.held_out if self.part == "held-out" else 1 - self.held_out
        return None if self.corpus.size is None else int(self.corpus.size * share)

    def describe(self) -> str:
        return f"the {self.part} part ({self.held_out:g} held out by document) of {self.corpus.describe()}"

    @property
    def fingerprint(self) -> str:
        return _hash("part", self.corpus.fingerprint, self.part, self.held_out)


@dataclass(frozen=True)
class InMemory(Corpus):
    """Documents at hand."""

    items: tuple[Document, ...]

    @classmethod
    def of(cls, texts: Iterable[str]) -> InMemory:
        return cls(tuple(Document(text, str(number)) for number, text in enumerate(texts)))

    @property
    def size(self) -> int:
        return sum(len(document.text) for document in self.items)

    def documents(self) -> Iterator[Document]:
        return iter(self.items)

    def describe(self) -> str:
        return f"a corpus of {len(self.items)} documents in memory"

    @functools.cached_property
    def fingerprint(self) -> str:
        return _hash("memory", *self.items)


@dataclass(frozen=True)
class Embedded(Corpus):
    """English and code that every Python brings along: the topics of its reference manual, and the sources of its
    standard library (without tests and character tables).  About 11 MB."""

    _SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"})

    def documents(self) -> Iterator[Document]:
        from pydoc_data.topics import topics

        for topic in sorted(topics):
            yield Document(topics[topic], f"topics/{topic}")
        root = Path(sysconfig.get_path("stdlib"))
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
            parts = path.relative_to(root).parts
            # _sysconfigdata is how this very interpreter was built, not library source
            if not self._SKIPPED.intersection(parts) and not parts[-1].startswith("_sysconfigdata"):
                with tokenize.open(path) as file:
                    yield Document(file.read(), f"stdlib/{'/'.join(parts)}")

    @property
    def size(self) -> int:
        return 11_000_000

    def describe(self) -> str:
        return "the embedded corpus (Python's documentation and standard library)"

    @functools.cached_property
    def fingerprint(self) -> str:
        return _hash("embedded", *(part for document in self for part in (document.name, document.text)))


@dataclass(frozen=True)
class _Files(Corpus):
    """Corpora made of files: `paths` are files, glob patterns (`**` crosses folders), or folders, of which every
    file that is not hidden counts."""

    paths: tuple[str, ...]

    @abstractmethod
    def read(self, path: Path, name: str) -> Iterator[Document]: ...

    def documents(self) -> Iterator[Document]:
        for name, path in self.files.items():
            try:
                yield from self.read(path, name)
            except (gzip.BadGzipFile, EOFError) as error:
                raise ValueError(f"{path} is not a whole gzip file ({error}); fetch it again") from error

    def describe(self) -> str:
        more = len(self.paths) - 3
        return ", ".join(self.paths[:3]) + (f" and {more} more" if more > 0 else "")

    @functools.cached_property
    def files(self) -> dict[str, Path]:
        """The files by name, in order.  Raises ValueError for a path or pattern without any file."""
        return find_files(self.paths)

    @functools.cached_property
    def fingerprint(self) -> str:
        options = [getattr(self, field.name) for field in fields(self) if field.name != "paths"]
        stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in self.files.items()]
        return _hash(type(self).__name__, *options, *stats)


@dataclass(frozen=True)
class TextFiles(_Files):
    """UTF-8 text (perhaps .gz): a file is a document, or with `separator` as many as it separates."""

    _: KW_ONLY
    separator: str | None = None

    @property
    def size(self) -> int | None:
        plain = all(path.suffix != ".gz" for path in self.files.values())
        return sum(path.stat().st_size for path in self.files.values()) if plain else None

    def read(self, path: Path, name: str) -> Iterator[Document]:
        text = read_text(path)
        if self.separator is None:
            yield Document(text, name)
        else:
            for number, part in enumerate(text.split(self.separator)):
                yield Document(part.strip("\n"), f"{name}:{number}")


@dataclass(frozen=True)
class JsonLines(_Files):
    """One JSON object a line (perhaps .gz); `text` and for pairs `target` name its fields, with dots for fields of
    fields."""

    _: KW_ONLY
    text: str = "text"
    target: str | None = None

    def read(self, path: Path, name: str) -> Iterator[Document]:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where} is not JSON ({error}); write one JSON object a line") from error
                yield _pair(row, self.text, self.target, f"{name}:{number}", where)


@dataclass(frozen=True)
class Parquet(_Files):
    """Rows of Parquet files; `text` and for pairs `target` name columns."""

    _: KW_ONLY
    text: str = "text"
    target: str | None = None

    def read(self, path: Path, name: str) -> Iterator[Document]:
        from pyarrow import ArrowInvalid, parquet

        try:
            file = parquet.ParquetFile(path)
        except ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file: {error}") from error
        columns = [field.split(".")[0] for field in (self.text, self.target) if field]
        if missing := [column for column in columns if column not in file.schema_arrow.names]:
            raise ValueError(_missing(str(path), missing[0], file.schema_arrow.names))
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                yield _pair(row, self.text, self.target, f"{name}:{number}", f"{path}, row {number}")
                number += 1


@dataclass(frozen=True)
class HuggingFace(Corpus):
    """A dataset of the `datasets` library, streamed: a hub id or a local folder of data files, never a script."""

    path: str
    _: KW_ONLY
    name: str | None = None
    split_name: str = "train"
    revision: str | None = None
    text: str = "text"
    target: str | None = None

    def documents(self) -> Iterator[Document]:
        import datasets

        try:
            rows = datasets.load_dataset(
                self.path, self.name, split=self.split_name, revision=self.revision, streaming=True
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{self.describe()} cannot be opened: {error}") from error
        for number, row in enumerate(rows):
            where = f"{self.describe()}, row {number}"
            yield _pair(row, self.text, self.target, f"{self.split_name}:{number}", where)

    def describe(self) -> str:
        return f"the dataset {self.path}" + (f" ({self.name})" if self.name else "") + f", split {self.split_name}"

    @property
    def fingerprint(self) -> str:
        stats = []
        if os.path.isdir(self.path):
            files = find_files([self.path]).items()
            stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files]
        settings = (self.name, self.split_name, self.revision, self.text, self.target)
        return _hash("datasets", self.path if not stats else "", *settings, *stats)


@dataclass(frozen=True)
class Gettext(_Files):
    """Parallel text: the messages of gettext catalogues (.po, .mo) with their translations.  A pair is named by its
    message, so that no message is in both parts of a split."""

    def read(self, path: Path, name: str) -> Iterator[Document]:
        for message, translation in catalogues.read(path):
            yield Document(message, _hash(message), translation)

    @classmethod
    def installed(cls, language: str) -> Gettext:
        """The catalogues of this machine's programs in a language, such as `de`."""
        roots = dict.fromkeys((Path(sysconfig.get_path("data")) / "share/locale", Path("/usr/share/locale")))
        found = [str(path) for root in roots for path in sorted(root.glob(f"{language}/LC_MESSAGES/*.mo"))]
        if not found:
            raise ValueError(f"no gettext catalogues for language {language!r} are installed; give .po or .mo files")
        return cls(tuple(found))


def open_corpus(
    source: PathLike | Sequence[PathLike],
    text: str = "text",
    target: str | None = None,
    separator: str | None = None,
    split: str = "train",
) -> Corpus:
    """The corpus that `source` names: `embedded`; `gettext:de` for the catalogues of this machine; `hf:ID` or
    `hf:ID:CONFIG` for a dataset (of which `split` is read); or files, folders and patterns, whose endings say what
    they are: JSON lines, .parquet, .po and .mo, else text.  `text` and `target` name fields."""
    if isinstance(source, str):
        scheme, _, rest = source.partition(":")
        if source == "embedded":
            return Embedded()
        if scheme == "gettext" and rest:
            return Gettext.installed(rest)
        if scheme == "hf" and rest:
            path, _, config = rest.partition(":")
            return HuggingFace(path, name=config or None, split_name=split, text=text, target=target)
    sources = [source] if isinstance(source, str | os.PathLike) else source
    if not sources:
        raise ValueError("the list of a corpus' files is empty; name some, or embedded")
    paths = tuple(os.fspath(path) for path in sources)
    endings = {path.name.removesuffix(".gz").rpartition(".")[2] for path in find_files(paths).values()}
    if endings <= {"jsonl", "ndjson", "json"}:
        return JsonLines(paths, text=text, target=target)
    if endings == {"parquet"}:
        return Parquet(paths, text=text, target=target)
    if endings <= {"po", "mo"}:
        return Gettext(paths)
    if endings & {"jsonl", "ndjson", "json", "parquet", "po", "mo"}:
        kinds = ", ".join(sorted(f".{ending}" for ending in endings))
        raise ValueError(f"{', '.join(paths)} mixes kinds of files ({kinds}); give a pattern such as 'data/**/*.jsonl'")
    return TextFiles(paths, separator=separator)


def find_files(paths: Sequence[str]) -> dict[str, Path]:
    """Files by name: that below a folder, or the file's own (with its folders, where two would be the same)."""
    found: dict[str, Path] = {}
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            inside = [file for file in path.rglob("*") if file.is_file()]
            names = {file: file.relative_to(path) for file in inside}
            here = {names[file].as_posix(): file for file in inside if not names[file].as_posix().startswith(".")}
            here = {name: file for name, file in here.items() if "/." not in name}
            if not here:
                raise ValueError(f"{path} is a folder without files; put text into it or give another")
        elif path.is_file():
            here = {path.name: path}
        elif glob.has_magic(given):
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
            here = {match.as_posix(): match for match in matches if match.is_file()}
            if not here:
                raise ValueError(f"{given} matches no file; check the pattern (** crosses folders)")
        else:
            raise ValueError(f"{given}: no such file or folder; check the path")
        for name in sorted(here):
            file = here[name]
            found[name if found.get(name, file) == file else file.as_posix()] = file
    return found


def read_text(path: Path) -> str:
    """A file's text.  Raises ValueError, naming the place, where it is not text in UTF-8."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if (position := data.find(b"\0")) >= 0:
        raise ValueError(f"{path} is binary (a NUL byte at {position}); leave it out, for instance by a pattern")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(
            f"{path} is not UTF-8 (byte {byte:#x} at {error.start}); convert it or leave it out"
        ) from error


def _pair(row: Any, text: str, target: str | None, name: str, where: str) -> Document:
    values = [_field(row, field, where) for field in (text, target) if field]
    return Document(values[0], name, values[1] if target else None)


def _field(row: Any, field: str, where: str) -> str:
    value = row
    for key in field.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(_missing(where, field, list(row) if isinstance(row, dict) else []))
        value = value[key]
        if value is None:
            return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {field!r} is a {type(value).__name__}, not text; name another field")
    if "\0" in value:
        raise ValueError(f"{where}: field {field!r} is binary (it holds NUL); name another field or clean it")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell halves of surrogate pairs, which are no characters
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _missing(where: str, field: str, fields: Sequence[str]) -> str:
    known = ", ".join(map(repr, fields)) or "none"
    return f"{where} has no field {field!r}; it has {known}: name the one with the text"


def _hash(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(repr, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:16]

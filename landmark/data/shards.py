"""Shards: a corpus tokenised once, on disk, read through memory maps.

A folder holds shard-NNNNN.bin (token ids, little-endian uint16 or uint32, one document after the other),
shard-NNNNN.ends.npy (where each document ends), token-bytes.npy (bytes of text of each id) and meta.json, which is
written last, after each shard: what it lists is whole, and what it does not list is written again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..weights.files import beside, read_json, read_object, write_json
from ..weights.tokenizer import Tokenizer
from .corpora import Corpus, Document

FORMAT = 1
_BATCH_CHARACTERS = 1 << 20  # encoded in one call: enough for all cores, little beside the rest of memory


def write_shards(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    side: Literal["text", "target"] = "text",
    bos: bool = False,
    shard_tokens: int = 1 << 25,
    progress: bool = True,
    overwrite: bool = False,
) -> Shards:
    """Tokenises `corpus` into `folder` and opens it; what is already there from the same corpus and tokenizer is kept,
    also of a call that was cut short.

    A document ends with the tokenizer's eos where it has one, and begins with its bos if `bos`. The text of a special
    token inside a document is text. Of pairs, `side` says which text. A shard is closed when it has `shard_tokens`.
    Raises ValueError for a corpus that cannot be read or is empty, and when `folder` holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; shards are a folder, so give another name")
    if bos and tokenizer.bos_id is None:
        raise ValueError("documents cannot begin with bos: this tokenizer has none; leave bos out")
    wide = tokenizer.vocab_size > 1 << 16
    meta: dict[str, Any] = {
        "format": FORMAT,
        "corpus": corpus.describe(),
        "corpus_fingerprint": corpus.fingerprint,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "side": side,
        "bos": bos,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "dtype": "uint32" if wide else "uint16",
        "complete": False,
        "shards": [],
    }
    path = folder / "meta.json"
    if overwrite:
        for old in [path, *folder.glob("shard-*")]:
            old.unlink(missing_ok=True)
    elif path.exists():
        found = read_json(path)
        changed = [key for key in meta if key not in ("corpus", "complete", "shards") and found.get(key) != meta[key]]
        if changed:
            raise ValueError(
                f"{folder} holds shards of something else (another {', another '.join(changed)}); "
                "give another folder, or overwrite them"
            )
        if found["complete"]:
            return Shards(folder)
        meta["shards"] = found["shards"]

    lengths = tokenizer.byte_lengths()
    with beside(folder / "token-bytes.npy") as temporary, temporary.open("wb") as file:
        np.save(file, lengths)
    done = sum(shard["documents"] for shard in meta["shards"])
    with _Progress(corpus, meta["shards"], progress) as bar:
        shard = _Shard(np.dtype(meta["dtype"]).newbyteorder("<"))
        for document, ids in _encode(islice(iter(corpus), done, None), tokenizer, side, bos):
            text = document.text if side == "text" else document.target
            assert text is not None
            shard.add(ids, len(text.encode()))
            bar.advance(len(text.encode()), len(ids))
            if shard.tokens >= shard_tokens:
                shard.write(folder, meta, lengths)
                shard = _Shard(shard.dtype)
        if shard.ends:
            shard.write(folder, meta, lengths)
    if not sum(shard["tokens"] for shard in meta["shards"]):
        raise ValueError(f"{corpus.describe()} has no tokens; give a corpus with text that the tokenizer knows")
    write_json(path, meta | {"complete": True})
    return Shards(folder)


class Shards:
    """A tokenised corpus. Documents are numbered from 0, and lie one after the other on one axis of all tokens."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.is_file():
            raise ValueError(f"{self.folder} is a file; give the folder that `landmark data tokenize` wrote")
        if not (self.folder / "meta.json").is_file():
            raise ValueError(f"{self.folder} holds no shards (no meta.json); write them with `landmark data tokenize`")
        self.meta = read_object(self.folder / "meta.json")
        if self.meta.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder}: shards of format {self.meta.get('format')}, not {FORMAT}; write them anew"
            )
        if not self.meta["complete"]:
            raise ValueError(f"{self.folder} is not finished; run the same `landmark data tokenize` again to go on")
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        self._maps: list[np.ndarray] = []
        ends: list[np.ndarray] = []
        for number, shard in enumerate(self.meta["shards"]):
            name = self.folder / f"shard-{number:05d}.bin"
            wanted = shard["tokens"] * dtype.itemsize
            size = name.stat().st_size if name.exists() else -1
            if size != wanted:
                state = "missing" if size < 0 else f"{size} bytes long, not {wanted}"
                raise ValueError(f"{name} is {state}; write the shards again")
            self._maps.append(np.memmap(name, dtype, "r").view(np.ndarray))
            ends.append(np.load(name.with_suffix(".ends.npy")) + (ends[-1][-1] if ends else 0))
        self._first = np.cumsum([0, *(shard["tokens"] for shard in self.meta["shards"])])
        self.ends: np.ndarray = np.concatenate(ends)  # int64 [documents], on the axis of all tokens
        self.lengths: np.ndarray = np.diff(self.ends, prepend=0)
        self.token_bytes: np.ndarray = np.load(self.folder / "token-bytes.npy")

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, document: int) -> np.ndarray:
        """The document's ids, a view of the file."""
        end = int(self.ends[document])
        return self._spans(np.array([end - self.lengths[document]]), np.array([end]))[0]

    def gather(self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """`lengths[i]` ids of document `documents[i]` from its token `starts[i]` on, for all i one after the other."""
        first = self.ends[documents] - self.lengths[documents] + starts
        spans = self._spans(first, first + lengths)
        return np.concatenate(spans) if spans else np.empty(0, np.int64)

    def _spans(self, first: np.ndarray, last: np.ndarray) -> list[np.ndarray]:
        """Views of spans of the axis of all tokens, none of which crosses a document's end."""
        shards = np.searchsorted(self._first, first, "right") - 1
        offsets = self._first[shards]
        bounds = zip(shards.tolist(), (first - offsets).tolist(), (last - offsets).tolist(), strict=True)
        return [self._maps[shard][start:stop] for shard, start, stop in bounds]

    @property
    def tokens(self) -> int:
        return int(self._first[-1])

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the texts."""
        return sum(shard["bytes"] for shard in self.meta["shards"])

    @property
    def decoded_bytes(self) -> int:
        """Bytes that the tokens stand for: equal to `bytes` for a byte-level tokenizer, else about."""
        return sum(shard["token_bytes"] for shard in self.meta["shards"])

    @property
    def fingerprint(self) -> str:
        keys = ("corpus_fingerprint", "tokenizer_fingerprint", "side", "bos")
        return hashlib.sha256(repr([self.meta[key] for key in keys]).encode()).hexdigest()[:16]

    def info(self) -> dict[str, Any]:
        """Figures for people and programs."""
        keys = ("corpus", "side", "bos", "vocab_size", "dtype", "corpus_fingerprint", "tokenizer_fingerprint")
        lengths = self.lengths
        return {
            "folder": str(self.folder),
            **{key: self.meta[key] for key in keys},
            "shards": len(self._maps),
            "documents": len(self),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bytes_per_token": self.bytes / self.tokens,
            "tokens_per_document": {
                "mean": float(lengths.mean()),
                "median": float(np.median(lengths)),
                "max": int(lengths.max()),
            },
        }


@dataclass
class _Shard:
    """A shard in the making."""

    dtype: np.dtype[Any]

    def __post_init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.ends: list[int] = []
        self.tokens = self.bytes = 0

    def add(self, ids: list[int], n_bytes: int) -> None:
        self.parts.append(np.array(ids, self.dtype))
        self.tokens += len(ids)
        self.bytes += n_bytes
        self.ends.append(self.tokens)

    def write(self, folder: Path, meta: dict[str, Any], byte_lengths: np.ndarray) -> None:
        tokens = np.concatenate(self.parts)
        name = folder / f"shard-{len(meta['shards']):05d}.bin"
        with beside(name) as temporary:
            tokens.tofile(temporary)
        with beside(name.with_suffix(".ends.npy")) as temporary, temporary.open("wb") as file:
            np.save(file, np.array(self.ends, np.int64))
        figures = {"tokens": self.tokens, "documents": len(self.ends), "bytes": self.bytes}
        figures["token_bytes"] = int(byte_lengths[tokens].sum(dtype=np.int64))
        meta["shards"].append(figures)
        write_json(folder / "meta.json", meta)


def _encode(
    documents: Iterator[Document], tokenizer: Tokenizer, side: str, bos: bool
) -> Iterator[tuple[Document, list[int]]]:
    first = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    last = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    for batch in _batches(documents):
        texts: list[str] = []
        parts: list[int] = []
        for document in batch:
            text = document.text if side == "text" else document.target
            if text is None:
                raise ValueError(f"document {document.name} has no target: this is not parallel text; leave side out")
            cut = _cut(text) if len(text) > _BATCH_CHARACTERS and tokenizer.breaks_at_lines else [text]
            texts += cut
            parts.append(len(cut))
        encoded = iter(tokenizer.encode_batch(texts, literal=True))
        for document, count in zip(batch, parts, strict=True):
            yield document, first + [index for ids in islice(encoded, count) for index in ids] + last


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + len(document.target or "")
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_LINE = re.compile(r"\n(?=[A-Za-z])")


def _cut(text: str, length: int = 1 << 18) -> list[str]:
    """Parts of about `length` characters, cut after line feeds before a letter."""
    cuts = [0]
    while (match := _LINE.search(text, cuts[-1] + length)) is not None:
        cuts.append(match.end())
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


class _Progress:
    """The bar: bytes done of those expected, tokens a second, time left."""

    def __init__(self, corpus: Corpus, shards: list[dict[str, int]], shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("tokenising"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%" if corpus.size else ""),
            TextColumn("{task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f}/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn() if corpus.size else TextColumn(""),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
        done = sum(shard["bytes"] for shard in shards)
        self._before = self._tokens = sum(shard["tokens"] for shard in shards)
        self._task = self._bar.add_task("", total=corpus.size, completed=done, tokens=self._tokens, rate=0.0)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self._bar.update(self._task, total=1, completed=1)
        self._bar.stop()

    def advance(self, n_bytes: int, tokens: int) -> None:
        self._tokens += tokens
        elapsed = self._bar.tasks[0].elapsed or 0.0
        rate = (self._tokens - self._before) / elapsed if elapsed else 0.0
        self._bar.update(self._task, advance=n_bytes, tokens=self._tokens, rate=rate)

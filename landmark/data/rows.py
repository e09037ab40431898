"""Rows of labelled data: JSON lines and Parquet, read one at a time from where they lie."""

from __future__ import annotations

import gzip
import hashlib
import json
import mmap
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..config import nearest
from .corpora import find_files


@dataclass(frozen=True)
class Row:
    """One JSON object, and the file and line where it stands."""

    values: Mapping[str, Any]
    where: str

    def __getitem__(self, field: str) -> Any:
        """Raises ValueError, naming file and line, where it is absent or null."""
        value = self.values.get(field)
        if value is None:
            known = ", ".join(map(repr, self.values))
            raise ValueError(f"{self.where} has no {field!r}{nearest(field, self.values)}; it has {known or 'nothing'}")
        return value

    def text(self, field: str) -> str:
        value = self[field]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.where}: {field!r} is {value!r}; it must be a text that is not empty")
        return value

    def label(self, field: str) -> Any:
        if self.values.get(field) is None:
            raise ValueError(f"{self.where} has no label; give it {field!r}, or name its field in [objective]")
        return self.values[field]

    @property
    def digest(self) -> int:
        """64 bits of a hash of the content."""
        text = json.dumps(self.values, sort_keys=True, default=str)
        return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


class Table(ABC):
    """The rows of one file."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, i: int) -> Row:
        """Raises ValueError, naming file and line, for what is no row."""


class Lines(Table):
    """JSON lines; mapped from the file, or in memory where that is packed (.gz)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            empty = path.suffix != ".gz" and not path.stat().st_size
            self.bytes: bytes | mmap.mmap = (
                b"" if empty else file.read() if path.suffix == ".gz"
                else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            )  # fmt: skip
        starts, numbers, at, number = [], [], 0, 0
        while at < len(self.bytes):
            number += 1
            end = self._end(at)
            if self.bytes[at:end].strip():
                starts.append(at)
                numbers.append(number)
            at = end + 1
        self.starts, self.numbers = (np.array(values, dtype=np.int64) for values in (starts, numbers))

    def _end(self, at: int) -> int:
        end = self.bytes.find(b"\n", at)
        return len(self.bytes) if end < 0 else end

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, i: int) -> Row:
        where, at = f"{self.path}, line {self.numbers[i]}", int(self.starts[i])
        try:
            values = json.loads(self.bytes[at : self._end(at)])
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}); write one JSON object a line") from None
        if not isinstance(values, dict):
            raise ValueError(f"{where} is no JSON object; write for instance {{'text': ..., 'label': ...}}")
        return Row(values, where)


class Columns(Table):
    """Parquet, its columns in memory as Arrow holds them."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            self.table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is no Parquet file, or is cut short ({str(error).splitlines()[0]})") from None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def row(self, i: int) -> Row:
        values = {name: self.table[name][i].as_py() for name in self.table.column_names}
        return Row(values, f"{self.path}, row {i + 1}")


class Rows(Sequence[Row]):
    """Rows of several files, of which only places and hashes are held in memory: 32 bytes a row."""

    def __init__(self, tables: Sequence[Table], digests: np.ndarray, places: np.ndarray) -> None:
        self.tables, self.digests, self.places = tables, digests, places
        self._starts = [0, *accumulate(len(table) for table in tables)]

    @classmethod
    def read(cls, paths: Sequence[str]) -> Self:
        """All rows of files, folders and patterns: JSON lines, perhaps .gz, and Parquet. Raises ValueError for what is
        neither, and for files without any row."""
        files = find_files(paths).values()
        tables = [Columns(path) if path.suffix == ".parquet" else Lines(path) for path in files]
        digests = np.array([table.row(i).digest for table in tables for i in range(len(table))], dtype=np.uint64)
        if not len(digests):
            raise ValueError(f"{', '.join(paths)} holds no rows; write one JSON object a line")
        return cls(tables, digests, np.arange(len(digests)))

    def where(self, chosen: np.ndarray) -> Self:
        """The rows of which `chosen` [rows] is true."""
        return type(self)(self.tables, self.digests[chosen], self.places[chosen])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        at = int(self.places[i])
        table = bisect_right(self._starts, at) - 1
        return self.tables[table].row(at - self._starts[table])

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from landmark.data.rows import Rows

ROWS = [{"text": f"Row {i} ü", "label": ("no", "yes")[i % 2], "n": [i, i + 1]} for i in range(50)]


def lines() -> str:
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def test_all_kinds_of_files_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(), encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines())
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    read = [Rows.read([str(tmp_path / name)]) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    for rows in read:
        assert [dict(row.values) for row in rows] == ROWS and np.array_equal(rows.digests, read[0].digests)
    together = Rows.read([str(tmp_path)])
    assert [row.values["text"] for row in together] == 3 * [row["text"] for row in ROWS]
    assert together[50].where.endswith("b.jsonl.gz, line 1") and together[149].where.endswith("c.parquet, row 50")
    assert together[51].where.endswith("line 3")  # lines without a row count
    odd = together.where(np.arange(150) % 2 == 1)
    assert len(odd) == 75 and odd[25].values == ROWS[1] and [row.values for row in odd[:2]] == [ROWS[1], ROWS[3]]


def test_rows_stay_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " * 2000}) + "\n" for i in range(2000)))
    tracemalloc.start()
    rows = Rows.read([str(path)])
    assert rows[1999].values["text"].startswith("1999 ")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 20


def test_what_holds_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    (tmp_path / "list.jsonl").write_text('{"a": 1}\n[1]\n')
    for name, message in (
        ("empty.jsonl", "holds no rows"),
        ("none.jsonl", "holds no rows"),
        ("cut.parquet", "is no Parquet file, or is cut short"),
        ("list.jsonl", "list.jsonl, line 2 is no JSON object"),
        ("nowhere.jsonl", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            Rows.read([str(tmp_path / name)])

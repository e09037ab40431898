"""Corpora: every kind of source, in the same order each time; one clear line for what is not text."""

from __future__ import annotations

import gettext
import gzip
import json
import re
import struct
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from landmark.data import catalogues
from landmark.data.corpora import (
    Corpus,
    Document,
    Embedded,
    Gettext,
    HuggingFace,
    InMemory,
    JsonLines,
    Parquet,
    TextFiles,
    open_corpus,
)

ROWS = [{"text": f"Row {i}: naïve 한국어\n", "deep": {"de": f"Zeile {i}"}} for i in range(5)]


def write_jsonl(path: Path, rows: list[dict] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n\n" for i, row in enumerate(rows)))
    return path


# -- embedded ----------------------------------------------------------------------------------------------------------


def test_embedded() -> None:
    documents = list(Embedded())
    names = [document.name for document in documents]
    assert len(set(names)) == len(names) > 500
    assert {"topics/lambda", "stdlib/ast.py", "stdlib/json/decoder.py"} <= set(names)
    assert not any(re.search(r"/tests?/|site-packages|_sysconfigdata", name) for name in names)
    assert names == [document.name for document in Embedded()]
    assert 7e6 < sum(len(document.text.encode()) for document in documents) < 2e7
    assert Embedded().fingerprint == Embedded().fingerprint


def test_split_is_a_partition_that_does_not_move() -> None:
    corpus = InMemory.of(f"document {i}" for i in range(1000))
    train, held = corpus.split(0.1)
    names = [[document.name for document in part] for part in (train, held)]
    assert sorted(names[0] + names[1]) == sorted(document.name for document in corpus)
    assert 60 < len(names[1]) < 140
    half = InMemory(corpus.items[::2])  # documents that are taken away move no other
    assert [d.name for d in half.split(0.1)[1]] == [name for name in names[1] if int(name) % 2 == 0]
    assert train.fingerprint != held.fingerprint != corpus.fingerprint
    with pytest.raises(ValueError, match="held-out fraction 1: give a number between 0 and 1"):
        corpus.split(1)
    with pytest.raises(ValueError, match=r"the held-out part .* holds no text"):
        list(InMemory.of(["one"]).split(0.001)[1])


# -- files -------------------------------------------------------------------------------------------------------------


def test_text_files_globs_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b/.git").mkdir(parents=True)
    (tmp_path / "b/two.txt").write_text("two 🙂")
    (tmp_path / "b/.git/config").write_bytes(b"\0")
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"three"))
    expected = [("b/two.txt", "two 🙂"), ("one.txt", "one\r\n"), ("z.txt.gz", "three")]
    corpus = open_corpus(tmp_path)
    assert isinstance(corpus, TextFiles)
    assert [(d.name, d.text) for d in corpus] == expected
    assert [d.text for d in open_corpus(f"{tmp_path}/**/*.txt")] == ["two 🙂", "one\r\n"]
    assert [d.text for d in open_corpus([tmp_path / "one.txt", tmp_path / "b/two.txt"])] == ["one\r\n", "two 🙂"]
    before = corpus.fingerprint
    assert open_corpus(tmp_path).fingerprint == before
    (tmp_path / "one.txt").write_text("other")
    assert open_corpus(tmp_path).fingerprint != before


def test_separator(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("a\nb\n<|end|>\nc\n<|end|>\n")
    corpus = open_corpus(tmp_path / "stories.txt", separator="<|end|>")
    assert [(d.name, d.text) for d in corpus] == [("stories.txt:0", "a\nb"), ("stories.txt:1", "c")]


def test_files_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    corpus = open_corpus([tmp_path / "a", tmp_path / "b"])
    assert [d.text for d in corpus] == ["a", "b"]
    assert len({d.name for d in corpus}) == 2


def test_json_lines(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl")
    corpus = open_corpus(path)
    assert isinstance(corpus, JsonLines)
    assert [d.text for d in corpus] == [row["text"] for row in ROWS]
    pairs = list(open_corpus(path, target="deep.de"))
    assert pairs[3] == Document(ROWS[3]["text"], "x.jsonl:7", "Zeile 3")
    assert list(open_corpus(path, target="deep.de").texts())[:2] == [ROWS[0]["text"], "Zeile 0"]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [d.text for d in open_corpus(tmp_path / "x.jsonl.gz")] == [row["text"] for row in ROWS]
    path.write_text('{"text": "half \\ud83d of \\ud83d\\ude42"}\n')
    assert [d.text for d in open_corpus(path)] == ["half \ufffd of 🙂"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*ROWS, {"text": None}]), tmp_path / "x.parquet")
    corpus = open_corpus(tmp_path)
    assert isinstance(corpus, Parquet)
    assert [d.text for d in corpus] == [row["text"] for row in ROWS]
    assert [d.target for d in open_corpus(tmp_path, target="deep.de")] == [row["deep"]["de"] for row in ROWS]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_hugging_face_datasets(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "data"
    data.mkdir()
    if kind == "jsonl":
        write_jsonl(data / "train.jsonl")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), data / "train.parquet")
    corpus = open_corpus(f"hf:{data}", target="deep.de")
    assert isinstance(corpus, HuggingFace)
    assert [d.text for d in corpus] == [row["text"] for row in ROWS]
    assert [d.target for d in corpus] == [row["deep"]["de"] for row in ROWS]
    assert corpus.fingerprint == open_corpus(f"hf:{data}", target="deep.de").fingerprint
    with pytest.raises(ValueError, match="has no field 'content'; it has 'text', 'deep'"):
        list(open_corpus(f"hf:{data}", text="content"))
    with pytest.raises(ValueError, match="split test cannot be opened"):
        list(open_corpus(f"hf:{data}", split="test"))
    with pytest.raises(ValueError, match="cannot be opened"):
        list(open_corpus(f"hf:{tmp_path}/none"))


# -- gettext -----------------------------------------------------------------------------------------------------------

PO = """\
# A catalogue.
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\\n"
"Plural-Forms: nplurals=2; plural=(n != 1);\\n"

#: a.c:1
msgid "File \\"%s\\"\\n"
msgstr "Datei „%s“\\n"
#, fuzzy, c-format
msgid "guess"
msgstr "geraten"
msgctxt "menu"
msgid "Open"
msgstr "Öffnen"

msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] "%d Dateien"

msgid ""
"long "
"text"
msgstr ""
"langer "
"Text"

msgid "untranslated"
msgstr ""

#~ msgid "old"
#~ msgstr "alt"
"""
PAIRS = [
    ('File "%s"\n', "Datei „%s“\n"),
    ("Open", "Öffnen"),
    ("%d file", "%d Datei"),
    ("%d files", "%d Dateien"),
    ("long text", "langer Text"),
]


def write_mo(path: Path, order: str, charset: str = "UTF-8") -> None:
    header = f"Content-Type: text/plain; charset={charset}\nPlural-Forms: nplurals=2; plural=(n != 1);\n"
    entries = {"": header, "menu\4Open": "Öffnen", "%d file\0%d files": "%d Datei\0%d Dateien", "a": "ä"}
    strings = sorted((key.encode(charset), value.encode(charset)) for key, value in entries.items())
    count, tables, data = len(strings), [b"", b""], b""
    base = 28 + 16 * count
    for side in (0, 1):
        for pair in strings:
            tables[side] += struct.pack(order + "2I", len(pair[side]), base + len(data))
            data += pair[side] + b"\0"
    head = struct.pack(order + "7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, base)
    path.write_bytes(head + tables[0] + tables[1] + data)


def test_po(tmp_path: Path) -> None:
    (tmp_path / "de.po").write_text(PO, "utf-8")
    assert list(catalogues.read(tmp_path / "de.po")) == PAIRS
    (tmp_path / "de.po").write_bytes(PO.replace("UTF-8", "CP1252").encode("cp1252"))
    assert list(catalogues.read(tmp_path / "de.po")) == PAIRS
    corpus = open_corpus(tmp_path / "de.po")
    assert isinstance(corpus, Gettext)
    assert [(d.text, d.target) for d in corpus] == PAIRS


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("charset", ["UTF-8", "ISO-8859-1"])
def test_mo_as_the_standard_library_reads_it(order: str, charset: str, tmp_path: Path) -> None:
    path = tmp_path / "de.mo"
    write_mo(path, order, charset)
    with path.open("rb") as file:
        reference = gettext.GNUTranslations(file)
    pairs = dict(catalogues.read(path))
    assert pairs == {"Open": "Öffnen", "%d file": "%d Datei", "%d files": "%d Dateien", "a": "ä"}
    assert reference.gettext("a") == pairs["a"] and reference.pgettext("menu", "Open") == pairs["Open"]
    assert reference.ngettext("%d file", "%d files", 1) == pairs["%d file"]
    assert reference.ngettext("%d file", "%d files", 2) == pairs["%d files"]


def test_broken_catalogues(tmp_path: Path) -> None:
    write_mo(tmp_path / "cut.mo", "<")
    (tmp_path / "cut.mo").write_bytes((tmp_path / "cut.mo").read_bytes()[:-20])
    (tmp_path / "not.mo").write_bytes(b"hello, this is no catalogue at all")
    (tmp_path / "not.po").write_text("hello")
    (tmp_path / "open.po").write_text('msgid "x\nmsgstr "y"')
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"{path.name} is not a gettext catalogue that can be read"):
            list(catalogues.read(path))


def test_no_installed_catalogues() -> None:
    with pytest.raises(ValueError, match="no gettext catalogues for language 'xx_none'"):
        open_corpus("gettext:xx_none")


# -- bad input ---------------------------------------------------------------------------------------------------------


def refusal(corpus: Corpus) -> str:
    with pytest.raises(ValueError) as caught:
        list(corpus)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_empty_and_binary(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"")
    assert f"{path} holds no text; give a corpus" in refusal(open_corpus(path))
    path.write_bytes(b"abc\0def")
    assert f"{path} is binary (a NUL byte at 3); leave it out" in refusal(open_corpus(path))
    path.write_bytes("naïve".encode("latin-1"))
    assert f"{path} is not UTF-8 (byte 0xef at 2); convert it" in refusal(open_corpus(path))
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"abc" * 100)[:-10])
    assert "is not a whole gzip file" in refusal(open_corpus(tmp_path / "x.txt.gz"))
    (tmp_path / "y.txt.gz").write_bytes(b"not at all")
    assert "is not a whole gzip file" in refusal(open_corpus(tmp_path / "y.txt.gz"))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none: no such file or folder; check the path"):
        open_corpus(tmp_path / "none")
    with pytest.raises(ValueError, match=r"\*\.txt matches no file; check the pattern"):
        open_corpus(f"{tmp_path}/*.txt")
    with pytest.raises(ValueError, match="is a folder without files"):
        open_corpus(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"mixes kinds of files \(\.jsonl, \.txt\); give a pattern"):
        open_corpus(tmp_path)


def test_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"content": "b", "id": 1}\n')
    assert f"{path}, line 2 has no field 'text'; it has 'content', 'id'" in refusal(open_corpus(path))
    for broken in ("", "[" * 9999 + "]" * 9999 + "}"):  # nested too deeply for the parser
        path.write_text('{"text": "a"}\n{"text": ' + broken + "\n")
        assert f"{path}, line 2 is not JSON" in refusal(open_corpus(path))
    path.write_text("[1]\n")
    assert f"{path}, line 1 has no field 'text'; it has none" in refusal(open_corpus(path))
    path.write_text('{"text": 5}\n')
    assert f"{path}, line 1: field 'text' is a int, not text" in refusal(open_corpus(path))
    path.write_text('{"text": "a\\u0000b"}\n')
    assert f"{path}, line 1: field 'text' is binary" in refusal(open_corpus(path))
    table = pyarrow.Table.from_pylist([{"words": "a"}])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert "x.parquet has no field 'text'; it has 'words'" in refusal(open_corpus(tmp_path / "x.parquet"))
    (tmp_path / "y.parquet").write_text("no")
    assert "y.parquet is not a Parquet file" in refusal(open_corpus(tmp_path / "y.parquet"))

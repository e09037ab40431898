"""Shards: what is written is what was tokenised; stopped anywhere, writing goes on; other things are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from landmark.data import shards as module
from landmark.data.corpora import Corpus, Document, InMemory
from landmark.data.shards import Shards, write_shards
from landmark.weights.tokenizer import Tokenizer
from landmark.weights.tokenizer_train import train_tokenizer

TEXTS = [*[topics[name] for name in sorted(topics)][:30], "🙂 <|end_of_text|> forged?", "x"]


def write(tokenizer: Tokenizer, folder: Path, texts: list[str] = TEXTS, **options: object) -> Shards:
    return write_shards(InMemory.of(texts), tokenizer, folder, progress=False, **options)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("shard_tokens", [2000, 1 << 25])
def test_content(bos: bool, shard_tokens: int, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = write(tokenizer, tmp_path, bos=bos, shard_tokens=shard_tokens)
    head = [tokenizer.bos_id] if bos else []
    expected = [[*head, *tokenizer.encode(text, literal=True), tokenizer.eos_id] for text in TEXTS]
    assert [shards[i].tolist() for i in range(len(shards))] == expected
    assert shards.lengths.tolist() == [len(ids) for ids in expected]
    assert (shards.tokens, shards.bytes) == (sum(map(len, expected)), sum(len(text.encode()) for text in TEXTS))
    assert shards.decoded_bytes == shards.bytes
    assert (shards[0] == tokenizer.eos_id).sum() == 1 and (shards[30] == tokenizer.eos_id).sum() == 1
    files = sorted(tmp_path.glob("*.bin"))
    assert (len(files) > 5) == (shard_tokens == 2000)
    raw = np.concatenate([np.fromfile(file, "<u2") for file in files])
    assert raw.tolist() == [i for ids in expected for i in ids]
    documents, starts, lengths = np.array([3, 0, 20]), np.array([5, 0, 1]), np.array([7, 3, 0])
    assert shards.gather(documents, starts, lengths).tolist() == expected[3][5:12] + expected[0][:3]
    info = shards.info()
    assert info["documents"] == 32 and info["bytes_per_token"] == shards.bytes / shards.tokens
    json.dumps(info)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    tokenizer = train_tokenizer("bpe", TEXTS, 400)
    tokenizer.backend.add_tokens([f"<{i}>" for i in range(1 << 16)])
    shards = write(Tokenizer(tokenizer.backend, tokenizer.special_tokens), tmp_path, ["a <65535> b"])
    assert shards.meta["dtype"] == "uint32" and shards[0].max() > 1 << 16


def test_reuse_and_refusal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tokenizer, tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write(tokenizer, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    with pytest.raises(ValueError, match=r"holds shards of something else \(another corpus_fingerprint"):
        write(tokenizer, tmp_path, ["other"])
    other = train_tokenizer("bpe", TEXTS, 500)
    with pytest.raises(ValueError, match=r"another tokenizer_fingerprint, another vocab_size.*or overwrite them"):
        write(other, tmp_path)
    with pytest.raises(ValueError, match="another bos"):
        write(tokenizer, tmp_path, bos=True)
    assert len(write(tokenizer, tmp_path, ["other"], overwrite=True, shard_tokens=100)) == 1
    assert len(list(tmp_path.glob("*.bin"))) == 1


@dataclass(frozen=True)
class Failing(Corpus):
    """Fails before its document number `at`; the fingerprint is that of the whole."""

    whole: InMemory
    at: int

    def documents(self) -> Iterator[Document]:
        for number, document in enumerate(self.whole):
            if number == self.at:
                raise KeyboardInterrupt
            yield document

    def describe(self) -> str:
        return "failing"

    @property
    def fingerprint(self) -> str:
        return self.whole.fingerprint


@pytest.mark.parametrize("at", [0, 1, 7, 15, 31])
def test_stopped_anywhere_it_goes_on(
    at: int, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 3000)
    write(tokenizer, tmp_path / "once", shard_tokens=3000)
    corpus = InMemory.of(TEXTS)
    with pytest.raises(KeyboardInterrupt):
        write_shards(Failing(corpus, at), tokenizer, tmp_path / "twice", shard_tokens=3000, progress=False)
    if (tmp_path / "twice/meta.json").exists():
        with pytest.raises(ValueError, match="is not finished; run the same"):
            Shards(tmp_path / "twice")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "twice").glob("shard-*")}
    assert (len(written) > 0) == (at > 1)
    write_shards(corpus, tokenizer, tmp_path / "twice", shard_tokens=3000, progress=False)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in written.items())
    for path in (tmp_path / "once").iterdir():
        assert (tmp_path / "twice" / path.name).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "twice").glob("*.tmp"))


def test_full_disk_leaves_what_was_whole(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 3000)
    save, calls = np.save, []

    def full(*args: object) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(module.np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write(tokenizer, tmp_path, shard_tokens=3000)
    assert json.loads((tmp_path / "meta.json").read_text())["complete"] is False
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    assert len(write(tokenizer, tmp_path, shard_tokens=3000)) == len(TEXTS)


def test_long_documents_are_cut_where_it_changes_nothing(tmp_path: Path) -> None:
    text = "\n".join(TEXTS) + "\n\n  x\n\n\ny\n" + "z" * 500
    for pattern in module_patterns():
        tokenizer = train_tokenizer("bpe", TEXTS, 500, pattern=pattern)
        assert tokenizer.breaks_at_lines
        parts = module._cut(text, 300)
        assert len(parts) > 100 and "".join(parts) == text
        ids = [i for part in parts for i in tokenizer.encode(part, literal=True)]
        assert ids == tokenizer.encode(text, literal=True)
    for kind in ("wordpiece", "unigram"):
        assert not train_tokenizer(kind, TEXTS, 500).breaks_at_lines


def module_patterns() -> list[str]:
    from landmark.weights import tokenizer_formats

    return sorted(tokenizer_formats.PATTERNS)


def test_lossy_tokenizers_know_their_bytes(tmp_path: Path) -> None:
    for kind in ("wordpiece", "unigram"):
        shards = write(train_tokenizer(kind, TEXTS, 500), tmp_path / kind)
        assert shards.bytes == sum(len(text.encode()) for text in TEXTS)
        assert 0.5 < shards.decoded_bytes / shards.bytes < 1.5


def test_pairs_and_empty(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pairs = InMemory((Document("one", "a", "eins"), Document("two", "b", " "), Document("three", "c", "drei")))
    text = write_shards(pairs, tokenizer, tmp_path / "s", progress=False)
    target = write_shards(pairs, tokenizer, tmp_path / "t", side="target", progress=False)
    assert [tokenizer.decode(text[i]) for i in range(2)] == ["one", "three"]
    assert [tokenizer.decode(target[i]) for i in range(2)] == ["eins", "drei"]
    with pytest.raises(ValueError, match="document 0 has no target: this is not parallel text"):
        write(tokenizer, tmp_path / "x", side="target")
    with pytest.raises(ValueError, match="holds no text; give a corpus"):
        write(tokenizer, tmp_path / "y", [" ", ""])


def test_bad_folders(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; shards are a folder"):
        write(tokenizer, tmp_path / "file")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        Shards(tmp_path / "file")
    with pytest.raises(ValueError, match="holds no shards"):
        Shards(tmp_path)
    wordpiece = train_tokenizer("wordpiece", TEXTS, 500)
    with pytest.raises(ValueError, match="cannot begin with bos: this tokenizer has none"):
        write(wordpiece, tmp_path / "w", bos=True)
    write(tokenizer, tmp_path / "cut")
    path = tmp_path / "cut/shard-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"shard-00000\.bin is \d+ bytes long, not \d+; write the shards again"):
        Shards(tmp_path / "cut")
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00000\.bin is missing"):
        Shards(tmp_path / "cut")


def test_a_list_for_meta_json(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text("[]")
    with pytest.raises(ValueError, match=r"meta.json holds a list; it must be a JSON object"):
        Shards(tmp_path)

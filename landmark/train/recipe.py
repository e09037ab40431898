"""What a whole run is made of, as its TOML file says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from ..config import Config
from ..nn.bitlinear import BitLinear
from ..weights.tokenizer_train import Kind
from .config import Settings
from .objectives import CausalLM, ObjectiveConfig
from .objectives.causal import SMALL as SMALL


class TokenizerConfig(Config):
    """A directory or vocabulary file; else the model's own, where it has one; else what is trained on the corpus."""

    path: str | None = None
    kind: Kind | None = None  # None: bpe, or for encoders wordpiece
    vocab_size: int = 4096


class CorpusConfig(Config):
    """A corpus as `open_corpus` takes it ("embedded", "hf:ID", files, folders, patterns), or a folder of shards."""

    corpus: str | tuple[str, ...] = "embedded"
    text: str = "text"  # the field, in JSON lines, Parquet and datasets
    target: str | None = None  # the field of the other side of parallel text
    separator: str | None = None
    split: str = "train"
    weight: float = 1.0

    def check(self) -> None:
        super().check()
        if not self.weight > 0:
            raise ValueError(f"the weight of {self.corpus} is {self.weight}; it must be positive")


class DataConfig(CorpusConfig):
    """What to train on, and in which pieces: `rows` x `length` tokens a micro-batch, over all processes."""

    mixture: tuple[CorpusConfig, ...] = ()  # several corpora by weight, in place of `corpus`
    held_out: float | str = 0.02  # the share that is held out, or another corpus (or folder of shards)
    rows: int = 8
    length: int = 256
    packing: Literal["concatenate", "best-fit"] = "concatenate"
    epochs: int | None = None  # None: as often as it takes

    def check(self) -> None:
        super().check()
        if isinstance(self.held_out, float | int) and not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"data.held_out is {self.held_out}; it must be a share below 1, or name a corpus")

    @property
    def corpora(self) -> tuple[CorpusConfig, ...]:
        return self.mixture or (self,)


class TrainConfig(Settings):
    """A whole run.

    `model` is a directory or hub id to go on from, a published size or config.json to begin anew, the contents of a
    config.json as a table, a tree of our own configs (a table with a `type`, such as `Pattern`), or a pattern of layers
    as a text; without any it is a small one that the objective can train. `linear` makes the linear maps of its layers
    ternary. `out` becomes a model directory.
    """

    out: str
    model: str | Mapping[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = CausalLM()
    linear: BitLinear.Config | None = None

    def check(self) -> None:
        super().check()
        if not self.out:
            raise ValueError("out is empty; name a directory for the run")

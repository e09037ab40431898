"""What a whole run is made of, as its TOML file says it."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from ..config import Config
from .config import Settings

SMALL = {  # about 5 M parameters with the default tokenizer
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
    "intermediate_size": 704, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 1024,
}  # fmt: skip


class TokenizerConfig(Config):
    """A directory or vocabulary file; else the model's own, where it has one; else what is trained on the corpus."""

    path: str | None = None
    kind: Literal["bpe", "wordpiece", "unigram"] = "bpe"
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


class ObjectiveConfig(Config, ABC, abstract=True):
    """What to learn, and so which kind of model and of text."""

    def check(self) -> None:
        super().check()
        for name, least, below in (
            ("z_loss", 0.0, 1e3), ("label_smoothing", 0.0, 1.0), ("probability", 1e-6, 1.0), ("span", 1e-6, 1.0)
        ):  # fmt: skip
            value = getattr(self, name, None)
            if value is not None and not least <= value < below:
                raise ValueError(f"objective.{name} is {value!r}; it must lie in [{least:g}, {below:g})")


class Causal(ObjectiveConfig):
    """The next token, by a decoder: `CausalLM`."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0


class Masked(ObjectiveConfig):
    """Hidden tokens, by an encoder with a masked-LM head: `MaskedLM`, with the options of `Masking`."""

    probability: float = 0.15
    whole_words: bool = False
    span: float | None = None


class Seq2seq(ObjectiveConfig):
    """A target text from its source, by an encoder-decoder: `Seq2Seq`; the corpus has a `target`."""

    label_smoothing: float = 0.1


class TrainConfig(Settings):
    """A whole run.

    `model` is a directory or hub id to go on from, a published size or config.json to begin anew, the contents of a
    config.json as a table, or a tree of our own configs (a table with a `type`). `out` becomes a model directory.
    """

    out: str
    model: str | Mapping[str, Any] = field(default_factory=SMALL.copy)
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = Causal()

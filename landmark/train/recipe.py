"""What a whole run is made of, as its TOML file says it."""

from __future__ import annotations

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
    kind: Literal["bpe", "unigram"] = "bpe"
    vocab_size: int = 4096


class CorpusConfig(Config):
    """A corpus as `open_corpus` takes it ("embedded", "hf:ID", files, folders, patterns), or a folder of shards."""

    corpus: str | tuple[str, ...] = "embedded"
    text: str = "text"  # the field, in JSON lines, Parquet and datasets
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


class CausalConfig(Config):
    """The objective: next tokens; see `CausalLM`."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def check(self) -> None:
        super().check()
        if self.z_loss < 0 or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"objective.z_loss is {self.z_loss} and objective.label_smoothing {self.label_smoothing}; "
                "the first must be 0 or more, the second in [0, 1)"
            )


class TrainConfig(Settings):
    """A whole run.

    `model` is a directory or hub id to go on from, a published size or config.json to begin anew, the contents of a
    config.json as a table, or a tree of our own configs (a table with a `type`). `out` becomes a model directory.
    """

    out: str
    model: str | Mapping[str, Any] = field(default_factory=SMALL.copy)
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    objective: CausalConfig = CausalConfig()

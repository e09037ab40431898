"""The next token, by a decoder: GPT and all that came after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ...data.batches import Batch, Batches
from ...data.corpora import Corpus
from ...models.base import Model
from ...objectives import lm
from ...parallel.world import World
from .. import loop
from .base import O_co, ObjectiveConfig, Pipeline

if TYPE_CHECKING:
    from ..prepare import Prepared

SMALL = {  # about 5 M parameters with the default tokenizer
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
    "intermediate_size": 704, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 1024,
}  # fmt: skip


class CausalLM(ObjectiveConfig):
    """Next tokens of packed documents; see `objectives.lm.CausalLM`."""

    writes: ClassVar[bool] = True

    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def check(self) -> None:
        super().check()
        self.within(0.0, 1e3, z_loss=self.z_loss)
        self.within(0.0, 1.0, label_smoothing=self.label_smoothing)

    def build(self) -> lm.CausalLM:
        return lm.CausalLM(self.z_loss, self.label_smoothing)

    def pipeline(self, prepared: Prepared) -> Packed[CausalLM]:
        return Packed(self, prepared)

    def small(self) -> Mapping[str, Any]:
        return SMALL


class Corpora(Pipeline[O_co]):
    """Documents of corpora, or their shards."""

    @property
    def fingerprint(self) -> list[Any]:
        return [[name, text.fingerprint] for name, (text, _) in self.prepared.parts.items()]

    def texts(self) -> Iterator[str]:
        for corpus in self.corpora("train"):
            yield from corpus.texts()

    def corpora(self, part: str) -> list[Corpus]:
        """Without those that are shards already."""
        named = [text for name, (text, _) in self.prepared.parts.items() if name.startswith(part)]
        return [text for text in named if isinstance(text, Corpus)]


class Packed(Corpora[O_co]):
    """Rows of documents that lie packed in shards."""

    def write(self) -> None:
        self.prepared.write_shards("text")

    def batches(self, model: Model, here: World) -> loop.Batches:
        return self.rows(here)

    def rows(self, here: World) -> Batches:
        d = self.data
        return Batches(
            self.prepared.sources("train"), d.rows, d.length, seed=self.seed, epochs=d.epochs, packing=d.packing,
            rank=here.rank, world=here.size,
        )  # fmt: skip

    def held_out(self, model: Model) -> Iterator[Batch]:
        for source in self.prepared.sources("held-out"):
            yield from Batches(source.shards, self.data.rows, self.data.length, shuffle=False, epochs=1)

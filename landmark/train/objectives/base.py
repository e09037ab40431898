"""An objective's config says what to learn, and all that follows: which text is read and how, and by which model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ...config import Config
from ...data.batches import check_settings
from ...models.base import Model
from ...models.decoder import Decoder
from ...models.encoder import Encoder
from ...models.encoder_decoder import EncoderDecoder
from ...objectives.base import Objective
from ...parallel.world import World
from ...weights.tokenizer import Tokenizer
from ...weights.tokenizer_train import DEFAULT_SPECIAL, Kind, train_tokenizer
from .. import loop

if TYPE_CHECKING:
    from ..prepare import Prepared

KINDS: dict[type[Model], str] = {Decoder: "a decoder", Encoder: "an encoder", EncoderDecoder: "an encoder-decoder"}

O_co = TypeVar("O_co", bound="ObjectiveConfig", covariant=True)


class ObjectiveConfig(Config, ABC, abstract=True):
    """What to learn. A run asks it for everything that depends on that, and never which one it is."""

    kind: ClassVar[Kind] = "bpe"  # of the tokenizer, where one is trained
    trains: ClassVar[type[Model]] = Decoder
    writes: ClassVar[bool] = False  # whether such a model can go on with a prompt

    @abstractmethod
    def build(self) -> Objective:
        """The loss."""

    @abstractmethod
    def pipeline(self, prepared: Prepared) -> Pipeline[ObjectiveConfig]:
        """What lies between the corpora of a run and its batches."""

    @abstractmethod
    def small(self) -> Mapping[str, Any]:
        """The config.json, but for the vocabulary, of a model that a laptop trains: where a run names none."""

    def train_tokenizer(self, kind: Kind, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """With the special tokens that such models need. Raises ValueError for a kind that cannot have them."""
        if "eos" not in DEFAULT_SPECIAL[kind]:
            raise ValueError(f"tokenizer.kind {kind!r} has no token that ends a text; choose bpe or unigram")
        return train_tokenizer(kind, texts, vocab_size)

    def reader(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer as documents are read with: they begin with its bos and end with its eos."""
        return tokenizer

    def accept(self, model: Model) -> Model:
        """The model. Raises ValueError, naming objective and model, for one that cannot learn this."""
        if not isinstance(model, self.trains):
            raise ValueError(
                f"the objective {self.type_name} trains {KINDS[self.trains]}, but [model] is "
                f"{KINDS[type(model)]} ({name_of(model)}); choose another model or another objective"
            )
        return model

    def within(self, least: float, below: float, **values: float | None) -> None:
        """Raise ValueError for a value outside of [least, below)."""
        for name, value in values.items():
            if value is not None and not least <= value < below:
                raise ValueError(f"objective.{name} is {value!r}; it must lie in [{least:g}, {below:g})")


class Pipeline(ABC, Generic[O_co]):
    """The text of one run, from its corpora to the batches of one objective."""

    def __init__(self, objective: O_co, prepared: Prepared) -> None:
        self.objective, self.prepared = objective, prepared
        self.data, self.seed = prepared.config.data, prepared.config.seed

    @property
    @abstractmethod
    def fingerprint(self) -> list[Any]:
        """JSON-ready data that changes when the text does."""

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """What a tokenizer is trained on: nothing that is held out."""

    @abstractmethod
    def batches(self, model: Model, here: World) -> loop.Batches:
        """This process's part of the training batches."""

    @abstractmethod
    def held_out(self, model: Model) -> Iterator[Any]:
        """All held-out batches once, the same in every process and at every evaluation."""

    def write(self) -> None:
        """Tokenise into the run's folder, in the first process, what is to be read from there."""

    def adapt(self, model: Model) -> Model:
        """The model with what the objective needs besides."""
        return self.objective.accept(model)


class SameData(Iterator[Any]):
    """`batches` that only go on with the data that they began with, which `fingerprint` tells."""

    def __init__(self, batches: loop.Batches, fingerprint: Any) -> None:
        self.batches, self.settings = batches, {"data": fingerprint}

    def __next__(self) -> Any:
        return next(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches.state_dict(), "settings": self.settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError if it was taken with other data."""
        check_settings(state["settings"], self.settings)
        self.batches.load_state_dict(state["batches"])


def name_of(model: Model) -> str:
    """The architecture, by its published name where it has one."""
    named = model.origin.hf.get("architectures") if model.origin else None
    return str(named[0]) if named else type(model).__name__

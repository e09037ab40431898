"""Published architectures by the name in their config.json, and published sizes by their own names.

A family is a small file that calls `register(Family(...))`; every module of this package is asked once.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..config import ModelConfig, nearest
from ..ops.activation import Activation, check_activation
from ..weights.rules import Drop, Rename, Rule
from .quantised import quantised

# Keys of config.json that say nothing about the numbers a model computes.
INERT = frozenset(
    """architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id initializer_range initializer_factor output_attentions
    output_hidden_states return_dict torchscript use_bfloat16 chunk_size_feed_forward id2label label2id problem_type
    task_specific_params tokenizer_class prefix finetuning_task keys_to_ignore_at_inference gradient_checkpointing
    is_encoder_decoder output_past summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout _attn_implementation attn_implementation classifier_dropout tie_encoder_decoder
    cross_attention_hidden_size max_length min_length num_beams do_sample early_stopping temperature top_k top_p
    license language directionality cache_implementation _attn_implementation_autoset n_ctx
    num_labels tf_legacy_loss pruned_heads attn_pdrop_rate torch_compile""".split()
)


# Activation functions that config.json calls otherwise than we do.
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh", "gelu_python": "gelu", "quick_gelu": "gelu_quick", "swish": "silu",
    "linear": "identity",
}  # fmt: skip


# Of a default: the kinds of value that may stand for it.
KINDS: tuple[tuple[Any, Any, str], ...] = (
    (bool, int, "true or false"),
    (int | float, int | float, "a number"),
    (Mapping, Mapping, "an object"),
)


class Keys:
    """A config.json under strict reading: every key is used, known to be inert, or an error that names it."""

    def __init__(self, hf: Mapping[str, Any]) -> None:
        self.hf, self.read = hf, set[str]()
        self.name = (hf.get("architectures") or [hf.get("model_type", "this model")])[0]

    def __getitem__(self, key: str) -> int:
        """A size or a count that has to be there."""
        value = self.get(key)
        if value is None:
            raise ValueError(f"config.json has no key {key!r}, which {self.name} needs")
        if not isinstance(value, int):
            raise ValueError(f"config.json: {key} is {value!r}; it must be a whole number")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where it is absent or null. Raises ValueError for another kind of value than that."""
        self.read.add(key)
        value = self.hf.get(key)
        if value is None:
            return default
        for kind, kinds, wanted in KINDS:
            if isinstance(default, kind):
                if not isinstance(value, kinds):
                    raise ValueError(f"config.json: {key} is {value!r}; it must be {wanted}")
                break
        return value

    def nullable(self, key: str, absent: Any) -> Any:
        """The value, null included (None), or `absent` where there is no such key."""
        self.read.add(key)
        return self.hf.get(key, absent)

    def quotient(self, key: str, parts: str) -> int:
        """A size divided by a number of equal parts, e.g. the width of one head. Raises ValueError for a remainder."""
        size, count = self[key], self[parts]
        if count < 1 or size % count:
            raise ValueError(f"config.json: {key} = {size} has no {count} equal parts ({parts}); choose a divisor")
        return size // count

    def activation(self, key: str = "hidden_act", default: str = "silu") -> Activation:
        """An activation function, by our name."""
        name = self.get(key, default)
        return ACTIVATIONS[name] if name in ACTIVATIONS else check_activation(name)

    def fixed(self, key: str, *allowed: Any) -> None:
        """A key that is understood only at these values (or absent)."""
        self.read.add(key)
        if key in self.hf and self.hf[key] not in allowed:
            values = " or ".join(repr(value) for value in allowed)
            raise ValueError(f"config.json: {key} = {self.hf[key]!r} is not supported for {self.name}; only {values}")

    def inert(self, *keys: str) -> None:
        """Keys that say nothing about the numbers, in this family."""
        self.read.update(keys)

    def done(self) -> None:
        """Complain about keys that nobody read: they could change the numbers."""
        for key in self.hf.keys() - self.read - INERT:
            if self.hf[key] not in (None, False, [], {}, ""):
                raise ValueError(
                    f"config.json: key {key!r} = {self.hf[key]!r} is not understood for {self.name} and could "
                    f"change its numbers{nearest(key, self.read)}; remove it if it does not matter"
                )


@dataclass(frozen=True)
class Family:
    """The diff of one family of papers: how its config.json reads as a config, and its weights as ours.

    `name` is the model_type of its config.json. `prefix` stands before all body weights, except in files that were
    saved without a head; `headed`, for bodies alone, in files that were saved with one. `sizes` maps a published size's
    name to its config.json; keys that a config.json leaves out have the defaults that the family's files had.
    """

    name: str
    architectures: tuple[str, ...]
    config: Callable[[Keys], ModelConfig]
    rules: Callable[[Keys], list[Rule]]
    prefix: str = ""
    headed: str = ""
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # The config of files that hold tensors of these names, where some may be left out of them.
    fitted: Callable[[ModelConfig, Collection[str]], ModelConfig] = lambda config, names: config

    def read(self, hf: Mapping[str, Any]) -> ModelConfig:
        keys = Keys(hf)
        said = keys.get("quantization_config", {})
        config = self.config(keys)
        keys.done()
        if not said:
            return config
        if not all(isinstance(rule, Rename | Drop) for rule in self.rules(Keys(hf))):
            raise ValueError(
                f"config.json: quantization_config is not supported for {keys.name}: its matrices are fused"
            )
        return quantised(config, said)


_FAMILIES: dict[str, Family] = {}
_SIZES: dict[str, tuple[Family, Mapping[str, Any]]] = {}


def register(family: Family) -> Family:
    for architecture in family.architectures:
        if architecture in _FAMILIES:
            raise ValueError(f"{architecture} is registered twice: by {_FAMILIES[architecture].name} and {family.name}")
        _FAMILIES[architecture] = family
    for name, hf in family.sizes.items():
        if name in _SIZES:
            raise ValueError(f"the size {name} is registered twice")
        _SIZES[name] = family, {"architectures": [family.architectures[0]], **hf}
    return family


@cache
def _discover() -> None:
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")


def families() -> dict[str, Family]:
    """Every family, by architecture."""
    _discover()
    return _FAMILIES


def sizes() -> Mapping[str, tuple[Family, Mapping[str, Any]]]:
    """Every published size, by name: its family and its config.json."""
    _discover()
    return _SIZES


def named(hf: Mapping[str, Any], architecture: str | None = None) -> dict[str, Any]:
    """The contents of a config.json under `architecture`, or else the one that it names; where it names none, the only
    one of its model_type, or the body of an encoder without a head. Raises ValueError where none is meant."""
    if not isinstance(hf, Mapping):
        raise ValueError(f"config.json holds a {type(hf).__name__}; it must be a JSON object")
    names = hf.get("architectures") or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'config.json: architectures is {names!r}; it must be a list, such as ["LlamaForCausalLM"]')
    if architecture is not None or names:
        return {**hf, **({"architectures": [architecture]} if architecture is not None else {})}
    kind = hf.get("model_type")
    found = {name: family for name, family in families().items() if family.name == kind}
    bodies = [name for name, family in found.items() if family.headed or len(found) == 1]
    if len(bodies) != 1:
        choices = f"choose one of {', '.join(found)}" if found else f"its model_type is {kind!r}, which is not known"
        raise ValueError(f'config.json names no architecture; add "architectures": {choices}')
    return {**hf, "architectures": bodies}


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family that a config.json names. Raises ValueError for an architecture that is not known."""
    names = named(hf)["architectures"]
    known = families()
    if names[0] not in known:
        listed = ", ".join(sorted(known))
        raise ValueError(f"unknown architecture {names[0]!r}{nearest(names[0], known)}; known are {listed}")
    return known[names[0]]


def published(name: str) -> tuple[Family, dict[str, Any]]:
    """A published size by name, e.g. "llama3.1-405b". Raises ValueError with the nearest name."""
    if name not in sizes():
        raise ValueError(f"no published size is called {name!r}{nearest(name, sizes())}")
    family, hf = sizes()[name]
    copy: dict[str, Any] = json.loads(json.dumps(hf))
    return family, copy

"""What a config is: a frozen, typed dataclass nested in the module that it builds.

    class MLP(nn.Module):
        class Config(ModuleConfig):
            hidden: int
            def build(self, dim: int) -> MLP: ...

A config holds only its component's own hyper-parameters; widths come from the parent at build time. Because every
config class is known by the name of its module, a tree of configs is also data: `to_dict` and `from_dict` are inverse,
`flatten` gives paths, and `diff` shows two models side by side.
"""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, dataclass_transform

from torch import nn

CONFIGS: dict[str, type[Config]] = {}


def at_least(least: int, *, default: int) -> Any:
    """A size field that may be smaller than one: `types: int = at_least(0, default=0)`."""
    return dataclasses.field(default=default, metadata={"least": least})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, at_least))
class Config:
    """A frozen, keyword-only dataclass, registered under the name of the class that it is nested in."""

    type_name: ClassVar[str]

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        if abstract:
            return
        cls.type_name = cls.__qualname__.removesuffix(".Config").rpartition(">.")[2]
        other = CONFIGS.setdefault(cls.type_name, cls)
        if other is not cls and other.__module__ != cls.__module__:
            raise TypeError(f"two configs are called {cls.type_name}: in {other.__module__} and in {cls.__module__}")

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ValueError for values that cannot be built; sizes (`int` fields) and numbers (`float`) are checked for
        every config."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "int | None") and value is not None:
                least = field.metadata.get("least", 1)
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise ValueError(
                        f"{self.type_name}.{field.name} is {value!r}; it must be a whole number of at least {least}"
                    )
            if field.type in ("float", "float | None") and not isinstance(value, int | float | None):
                raise ValueError(f"{self.type_name}.{field.name} is {value!r}; it must be a number")


def fields(config: Config | type[Config]) -> tuple[dataclasses.Field[Any], ...]:
    """The dataclass fields of a config."""
    return dataclasses.fields(config)  # type: ignore[arg-type]  # made a dataclass by __init_subclass__


class ModuleConfig(Config, ABC, abstract=True):
    """The config of a component of width `dim`: anything that maps [..., dim] to [..., dim]."""

    @abstractmethod
    def build(self, dim: int) -> nn.Module:
        """The module, with its parameters initialised."""


class ModelConfig(Config, ABC, abstract=True):
    """The config of a whole model, which knows its own width."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The module, with its parameters initialised. Under `torch.device("meta")` nothing is allocated."""


def to_dict(value: Any) -> Any:
    """The tree as JSON-ready data; runs of equal layers are written once, as {"repeat": n, "of": ...}."""
    if isinstance(value, Config):
        return {"type": value.type_name, **{f.name: to_dict(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items: list[Any] = []
        for item in map(to_dict, value):
            if items and isinstance(item, dict) and items[-1].get("of") == item:
                items[-1]["repeat"] += 1
            else:
                items.append({"repeat": 1, "of": item} if isinstance(item, dict) else item)
        return items
    return value


def from_dict(data: Any) -> Any:
    """The inverse of `to_dict`. Unknown types and fields are errors that name the nearest known one."""
    if isinstance(data, list):
        items: list[Any] = []
        for item in data:
            if isinstance(item, Mapping) and item.keys() == {"repeat", "of"}:
                items += [from_dict(item["of"])] * item["repeat"]
            else:
                items.append(from_dict(item))
        return tuple(items)
    if not isinstance(data, Mapping):
        return data
    if "type" not in data:
        return {key: from_dict(item) for key, item in data.items()}
    name = data["type"]
    if name not in CONFIGS:
        raise ValueError(f"unknown config type {name!r}{nearest(name, CONFIGS)}")
    cls = CONFIGS[name]
    known = {f.name for f in fields(cls)}
    for key in data.keys() - known - {"type"}:
        raise ValueError(f"{name} has no field {key!r}{nearest(key, known)}")
    for f in fields(cls):
        if f.name not in data and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name} needs the field {f.name!r}")
    return cls(**{key: from_dict(item) for key, item in data.items() if key != "type"})


def nearest(name: str, known: Any) -> str:
    """'; did you mean ...?' for an error message, or nothing when no known name is near."""
    close = difflib.get_close_matches(str(name), list(map(str, known)), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Path -> leaf, e.g. {"layers.0-31.attn.fn.heads": 32}; equal neighbouring layers share a path."""
    data = to_dict(value) if isinstance(value, Config) else value
    leaves: dict[str, Any] = {}
    if isinstance(data, Mapping):
        for key, item in data.items():
            if key == "type":
                leaves[path or "type"] = item
            else:
                leaves |= flatten(item, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list) and any(isinstance(item, Mapping) for item in data):
        first = 0
        for item in data:
            count = item["repeat"] if isinstance(item, Mapping) and "repeat" in item else 1
            span = str(first) if count == 1 else f"{first}-{first + count - 1}"
            leaves |= flatten(item["of"] if isinstance(item, Mapping) and "of" in item else item, f"{path}.{span}")
            first += count
    else:
        leaves[path] = data
    return leaves

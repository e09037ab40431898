"""Configs from TOML: strict, typed, and with errors that say what was meant."""

from __future__ import annotations

import dataclasses
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..config import CONFIGS, Config, fields, nearest

C = TypeVar("C", bound=Config)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Raises ValueError, naming file and line, for what is not TOML."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give the TOML file of a run")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`data` with `a.b=value` set; the value is TOML, or else a string."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise ValueError(f"--set {assignment}: write it as key=value, for example optimizer.lr=1e-3")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        table = data
        for part in path[:-1]:
            if not isinstance(table.setdefault(part, {}), dict):
                table[part] = {"type": table[part]}
            table = table[part]
        table[path[-1]] = value
    return data


def parse(cls: type[C], data: Mapping[str, Any], path: str = "") -> C:
    """A config from a table. Raises ValueError for unknown keys, values of another type, and values out of range."""
    hints, values = get_type_hints(cls), {}
    known = {f.name: f for f in fields(cls)}
    for key, value in data.items():
        if key not in known:
            where = f"[{path}]" if path else "the configuration of a run"
            raise ValueError(f"{where} has no key {key!r}{nearest(key, known)}; it has {', '.join(known)}")
        values[key] = _value(hints[key], value, f"{path}.{key}" if path else key, known[key].default)
    try:
        return cls(**values)
    except TypeError as error:  # a required field is missing
        missing = [f.name for f in fields(cls) if f.name not in values and _required(f)]
        if not missing:
            raise
        where = f"[{path}]" if path else "the configuration of a run"
        raise ValueError(f"{where} needs the key {missing[0]!r}") from error


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(hint: Any, value: Any, path: str, default: Any = None) -> Any:
    """`value` as `hint` wants it; a table without a type changes the `default`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _value(option, value, path, default)
            except _WrongType as error:
                errors.append(error)
        raise errors[0] if len(errors) == 1 else _WrongType(path, value, " or ".join(e.wanted for e in errors))
    if origin is Literal:
        if value not in args:
            close = nearest(value, args)
            raise ValueError(f"{path} is {value!r}{close}; choose one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _WrongType(path, value, "a list")
        item = args[0]
        return tuple(_value(item, x, f"{path}.{i}") for i, x in enumerate(value))
    if isinstance(hint, type) and issubclass(hint, Config):
        return _table(hint, value, path, default)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _WrongType(path, value, "a table")
        return value
    wanted = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in wanted and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise _WrongType(path, value, wanted[hint])
    return value


def _table(hint: type[Config], value: Any, path: str, default: Any) -> Config:
    """A table as the config class that its `type` names; a text alone is a type."""
    data = {"type": value} if isinstance(value, str) else value
    if not isinstance(data, Mapping):
        raise _WrongType(path, value, "a table")
    choices = {name.lower(): cls for name, cls in CONFIGS.items() if issubclass(cls, hint)}
    name = str(data.get("type", type(default).type_name if isinstance(default, hint) else hint.__name__)).lower()
    if name not in choices:
        names = ", ".join(cls.type_name for cls in choices.values())
        raise ValueError(f"{path}.type is {data.get('type')!r}{nearest(name, choices)}; choose one of {names}")
    config = parse(choices[name], {k: v for k, v in data.items() if k != "type"}, path)
    if type(default) is not type(config):
        return config
    return type(config)(**{f.name: getattr(config if f.name in data else default, f.name) for f in fields(config)})


class _WrongType(ValueError):
    def __init__(self, path: str, value: Any, wanted: str) -> None:
        super().__init__(f"{path} is {value!r}; it must be {wanted}")
        self.wanted = wanted

"""Two configs side by side: what changed from one to the other, said once for all layers that changed alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import Config, to_dict
from ..nn.residual import Repeat


@dataclass(frozen=True)
class Pattern:
    """A value that differs between layers: (value, how many layers in a row) over the depth, or over one period."""

    runs: tuple[tuple[Any, int], ...]
    periodic: bool

    def __str__(self) -> str:
        said = ", ".join(f"{show(value)} x{times}" if times > 1 else show(value) for value, times in self.runs)
        return f"({said}) ..." if self.periodic else said


@dataclass(frozen=True)
class Change:
    """At `path`, `before` became `after`; None where there was, or is, nothing."""

    path: str
    before: Any
    after: Any


def show(value: Any) -> str:
    """A value of a config in print."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def leaves(config: Config) -> dict[str, Any]:
    """Path -> value. Layers share their paths, with a `Pattern` where they differ: {"layers.attn.fn.heads": 32}."""
    return _leaves(to_dict(config), "")


def _leaves(data: Any, path: str) -> dict[str, Any]:
    if isinstance(data, Mapping):
        out: dict[str, Any] = {}
        for key, item in data.items():
            if key == "type":
                out[path or "model"] = item
            else:
                out |= _leaves(item, f"{path}.{key}" if path else str(key))
        return out
    if not (isinstance(data, list) and data and all(isinstance(item, Mapping) for item in data)):
        return {path: data}
    runs = list(_layers(data, path))
    keys: list[str] = []
    for layer, _ in runs:
        keys = keys if layer.keys() <= set(keys) else _merged(keys, list(layer))
    depth = sum(times for _, times in runs)
    return {path: depth} | {key: _series([(layer.get(key), times) for layer, times in runs]) for key in keys}


def _layers(data: Sequence[Mapping[str, Any]], path: str) -> Iterator[tuple[dict[str, Any], int]]:
    """The leaves of layers, and how many in a row have them; those that share weights say how often one is used."""
    for item in data:
        layer, times = item["of"], item["repeat"]
        if layer.get("type") == Repeat.Config.type_name:
            for _ in range(times * layer["times"]):
                for leaf, inner in _layers(layer["layers"], path):
                    yield {f"{path}.shared": layer["times"], **leaf}, inner
        else:
            yield _leaves(layer, path), times


def _series(runs: list[tuple[Any, int]]) -> Any:
    """One value for all layers, the period in which they repeat, or the runs of equal ones."""
    values = [value for value, times in runs for _ in range(times)]
    for period in range(1, len(values) // 2 + 1):
        if all(value == values[i % period] for i, value in enumerate(values)):
            return values[0] if period == 1 else Pattern(_runs(values[:period]), periodic=True)
    return values[0] if len(values) == 1 else Pattern(_runs(values), periodic=False)


def _runs(values: list[Any]) -> tuple[tuple[Any, int], ...]:
    runs: list[tuple[Any, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = value, runs[-1][1] + 1
        else:
            runs.append((value, 1))
    return tuple(runs)


def _merged(old: list[str], new: list[str]) -> list[str]:
    """All names of both, those of `new` alone behind the one that they follow there."""
    out, place = list(old), 0
    for name in new:
        if name in out:
            place = out.index(name) + 1
        else:
            out.insert(place, name)
            place += 1
    return out


def diff(before: Config, after: Config) -> list[Change]:
    """What changed, in the order of the configs. Of a component that is gone only that is said, and of a new one (or of
    a field that one kind has and the other lacks) not what it leaves off."""
    old, new = leaves(before), leaves(after)
    changes: list[Change] = []
    gone: list[str] = []
    for path in _merged(list(old), list(new)):
        a, b = old.get(path), new.get(path)
        nothing_new = not (a or b) and not (path in old and path in new)
        if a == b or nothing_new or any(path.startswith(f"{part}.") for part in gone):
            continue
        if b is None:
            gone.append(path)
        changes.append(Change(path, a, b))
    return changes

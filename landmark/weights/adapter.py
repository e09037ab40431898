"""Adapters of low rank from and to directories in PEFT's format: adapter_config.json, adapter_model.safetensors.

Their names are those of the published model's modules; the rules of its family make ours of them, as of its weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import nearest
from ..models.base import Model
from ..models.registry import Keys, families, family_of
from ..nn.lora import linear_maps
from .checkpoint import locate
from .files import read_file, read_json, write_file, write_json
from .low_rank import LowRank
from .rules import Rule, load, unload

CONFIG, WEIGHTS, ROOT = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

# Keys that say nothing about the numbers of a trained adapter; what fan_in_fan_out says, the rules know.
INERT = frozenset(
    """peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout
    fan_in_fan_out megatron_core qalora_group_size runtime_config eva_config""".split()
)
READ = frozenset(
    """r lora_alpha target_modules exclude_modules use_rslora rank_pattern alpha_pattern layers_to_transform
    layers_pattern bias init_lora_weights""".split()
)
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # ways to begin that leave the base as it is


@dataclass
class Adapter:
    """Low-rank changes of linear maps, by our names of the maps; `config` as read from adapter_config.json."""

    factors: dict[str, LowRank]
    config: Mapping[str, Any] = field(default_factory=dict)


def read_adapter(directory: str | Path, model: Model) -> Adapter:
    """The adapter in a directory, or under a hub id, for this model.

    Raises ValueError, naming the file and the key, for what would change the numbers and is not understood, and for an
    adapter that was made for another model: maps that this one lacks, tensors that are missing or of another shape.
    """
    directory = locate(directory)
    if not (directory / CONFIG).exists():
        raise ValueError(f"{directory} holds no {CONFIG}; an adapter is a directory with that and {WEIGHTS}")
    config = read_json(directory / CONFIG)
    check_config(config, directory / CONFIG)
    if not (directory / WEIGHTS).exists():
        raise ValueError(f"{directory} holds no {WEIGHTS}; only safetensors are read")
    pairs = _pairs(read_file(directory / WEIGHTS), directory / WEIGHTS)
    prefix = _prefix(model)
    if prefix and not any(path.startswith(prefix) for path in pairs):
        pairs = {prefix + path: pair for path, pair in pairs.items()}
    there = places(model)
    for path, (down, up) in pairs.items():
        if (place := there.get(f"{path}.weight")) is None:
            close = nearest(path, [name.removesuffix(".weight") for name in there])
            raise ValueError(f"{directory} changes {path!r}, but the model has no such linear map{close}")
        rank = rank_of(config, path)
        inputs, outputs = place.shape if place.turned else place.shape[::-1]
        for name, tensor, shape in (("A", down, (rank, inputs)), ("B", up, (outputs, rank))):
            if tensor.shape != shape:
                raise ValueError(
                    f"{directory}: lora_{name} of {path!r} has the shape {tuple(tensor.shape)}, but on this model it "
                    f"is {tuple(shape)}; the adapter was made for another one"
                )
        found = LowRank(up, down, scale_of(config, path), expert=place.expert)
        there[f"{path}.weight"] = found.mT if place.turned else found
    wanted = [name.removesuffix(".weight") for name, place in there.items() if place.dim() == 2 and not place.expert]
    targets = Targets(config, pairs)
    if missing := [path for path in wanted if path not in pairs and targets.match(path)]:
        raise ValueError(f"{directory} lacks {len(missing)} maps that its config names, the first {missing[0]!r}")
    if surplus := [path for path in pairs if not targets.match(path)]:
        raise ValueError(f"{directory} changes {surplus[0]!r}, which target_modules of its config leaves out")
    rules, ours = _rules(model), dict[str, Any](there)
    ours = dict[str, Any](load(rules, ours)) if rules else ours
    return Adapter({name.removesuffix(".weight"): low for name, low in ours.items() if low.rank}, config)


def write_adapter(adapter: Adapter, model: Model, directory: str | Path) -> None:
    """Write a directory that `read_adapter` gives back, and PEFT loads beside the published form of this model."""
    ours = _nothing(model)
    for name, low in adapter.factors.items():
        if f"{name}.weight" not in ours:
            raise ValueError(f"the adapter changes {name!r}, but the model has no such linear map{nearest(name, ours)}")
        ours[f"{name}.weight"] = low
    theirs = _theirs(model, ours)
    found = {
        name.removesuffix(".weight"): low.mT if low.turned else low for name, low in theirs.items() if low.rank
    }  # fmt: skip
    if stacks := [path for path, low in found.items() if low.dim() > 2]:
        raise ValueError(
            f"the adapter changes {stacks[0]!r}, which is one tensor of many experts; PEFT has no name for it"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for path, low in found.items():
        tensors |= {f"{ROOT}{path}.lora_A.weight": low.right.clone(), f"{ROOT}{path}.lora_B.weight": low.left.clone()}
    write_file(directory / WEIGHTS, tensors)
    write_json(directory / CONFIG, config_of(adapter.config, found, [n.removesuffix(".weight") for n in theirs]))


def places(model: Model) -> dict[str, LowRank]:
    """Every matrix of the published form of a model that a linear map of ours is made of: zeros of rank 0."""
    return _theirs(model, _nothing(model))


def _nothing(model: Model) -> dict[str, LowRank]:
    return {f"{name}.weight": LowRank.nothing(*shape) for name, _, shape in linear_maps(model)}


def _theirs(model: Model, ours: Mapping[str, Any]) -> dict[str, LowRank]:
    rules = _rules(model)
    theirs: Any = unload(rules, ours) if rules else dict(ours)
    return dict(theirs)


def _published(model: Model) -> Mapping[str, Any] | None:
    hf = {} if model.origin is None else model.origin.hf
    return hf if (hf.get("architectures") or [None])[0] in families() else None


def _rules(model: Model) -> list[Rule]:
    """Of the model's family; empty where there is none, whose names are ours."""
    hf = _published(model)
    return [] if hf is None else family_of(hf).rules(Keys(hf))


def _prefix(model: Model) -> str:
    hf = _published(model)
    return "" if hf is None else family_of(hf).prefix


def _pairs(tensors: Mapping[str, Tensor], where: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of the map."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        hit = re.fullmatch(re.escape(ROOT) + r"(.+)\.lora_([AB])\.weight", key)
        if hit is None or tensor.dim() != 2:
            raise ValueError(f"{where}: {key!r} is not understood; only lora_A and lora_B of linear maps are")
        halves.setdefault(hit[1], {})[hit[2]] = tensor
    for path, half in halves.items():
        if len(half) < 2:
            raise ValueError(f"{where}: lora_{'B' if 'A' in half else 'A'} of {path!r} is missing")
    if not halves:
        raise ValueError(f"{where} holds no tensors")
    return {path: (half["A"], half["B"]) for path, half in halves.items()}


# -- adapter_config.json ----------------------------------------------------------------------------------------------


def check_config(config: Any, where: Path) -> None:
    """Raise ValueError for what would change the numbers and is not understood."""
    if not isinstance(config, Mapping) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, Mapping) else config
        raise ValueError(f"{where}: peft_type is {kind!r}; only LORA is read")
    for key, value in config.items():
        if key in INERT or value in (None, False, [], {}, ""):
            continue
        if key == "bias" and value == "none":
            continue
        if key == "init_lora_weights" and value in STARTS:
            continue
        if key not in READ or key in ("bias", "init_lora_weights"):
            raise ValueError(f"{where}: {key} = {value!r} is not supported; it would change the numbers")
    rank = config.get("r", 8)
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{where}: r is {rank!r}; the rank is a whole number of at least 1")
    if not config.get("target_modules"):
        raise ValueError(f"{where} names no target_modules")


def rank_of(config: Mapping[str, Any], path: str) -> int:
    """The rank of the adapter of one map, by its name in the published model."""
    return int(_by_pattern(config.get("rank_pattern"), path, config.get("r", 8)))


def scale_of(config: Mapping[str, Any], path: str) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
    alpha, rank = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8)), rank_of(config, path)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


class Targets:
    """Which maps a config names: by a regular expression, by ends of names, or all linear ones of the kinds found."""

    def __init__(self, config: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        wanted = config["target_modules"]
        if wanted == "all-linear":
            wanted = sorted({path.rpartition(".")[2] for path in found})
        self._wanted: str | list[str] = wanted
        self._not: Any = config.get("exclude_modules")
        layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
        self._layers = [layers] if isinstance(layers, int) else layers or None
        names = [pattern] if isinstance(pattern, str) else pattern
        self._layer = [rf".*\.{name}\.(\d+)\." for name in names] if names else [r".*\.[^.]*\.(\d+)\."]

    def match(self, path: str) -> bool:
        if self._not and self._is(self._not, path):
            return False
        if not self._is(self._wanted, path):
            return False
        if self._layers is None or isinstance(self._wanted, str) or path in self._wanted:
            return True
        hit = next((hit for pattern in self._layer if (hit := re.match(pattern, path))), None)
        return hit is not None and int(hit[1]) in self._layers

    @staticmethod
    def _is(wanted: str | list[str], path: str) -> bool:
        if isinstance(wanted, str):
            return re.fullmatch(wanted, path) is not None
        return any(path == end or path.endswith(f".{end}") for end in wanted)


def config_of(config: Mapping[str, Any], found: Mapping[str, LowRank], every: list[str]) -> dict[str, Any]:
    """The config of an adapter with these factors, by published names, of the maps `every`: the given one if it says
    them."""
    if config:
        targets = Targets(config, found)
        same = all(
            rank_of(config, path) == low.rank and scale_of(config, path) == low.scale for path, low in found.items()
        )
        if same and all(targets.match(path) for path in found):
            return dict(config)
    rank, scale = Counter((low.rank, low.scale) for low in found.values()).most_common(1)[0][0]
    ends = sorted({path.rpartition(".")[2] for path in found})
    exact = all(path in found for path in every if path.rpartition(".")[2] in ends)
    return {
        **{key: value for key, value in config.items() if key in INERT},
        "peft_type": "LORA", "bias": "none", "r": rank, "lora_alpha": _whole(scale * rank),
        "target_modules": ends if exact else sorted(found),
        "rank_pattern": {re.escape(path): low.rank for path, low in found.items() if low.rank != rank},
        "alpha_pattern": {
            re.escape(path): _whole(low.scale * low.rank)
            for path, low in found.items() if low.scale * low.rank != scale * rank
        },
    }  # fmt: skip


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number

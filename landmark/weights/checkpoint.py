"""Models from and to directories in the ecosystem's format: config.json, safetensors, and what travels along."""

from __future__ import annotations

import importlib
import pkgutil
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import nn
from ..config import ModelConfig, from_dict, nearest, to_dict
from ..models.base import Model, Origin
from ..models.pattern import Pattern, is_pattern
from ..models.registry import Family, Keys, family_of, named, published, sizes
from ..nn.codes import Codes
from ..nn.float32 import float32_buffers
from ..nn.lora import LoRA
from .files import beside, read_json, read_object, read_tensors, write_json, write_tensors
from .rules import load as apply_rules
from .rules import unload

NATIVE = "LandmarkModel"  # the architecture of models that no published class describes
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model", "*.tiktoken",
    "chat_template*", "generation_config.json", "preprocessor_config.json", "modules.json", "*_Pooling/config.json",
    "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
PRETRAINED = ("cls.", "lm_head.", "predictions.", "sop_classifier.", "lm_predictions.", "mask_predictions.")  # heads
DOWNLOADED = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.tiktoken")


def load(
    where: str | Path,
    *,
    architecture: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Model:
    """The model in a directory, or under a hub id, in eval mode.

    `architecture` stands for what config.json names. Where that names none (DeBERTa v3's), an encoder is read without
    a head, as "DebertaV2Model": a call gives hidden states, and the heads that it was pre-trained with are left out.
    `for_task` and `landmark train` give it the head of a task.

    Weights are mapped from the file, not copied, where dtype, device and layout allow it. `dtype` None keeps what is
    stored. Raises ValueError for whatever would make the numbers wrong: an unknown architecture, keys of config.json
    that are not understood, tensors that are missing, surplus, truncated or of another shape.
    """
    directory = locate(where)
    hf = named(read_model_json(directory), architecture)
    config, family = read_config(hf)
    theirs = read_tensors(directory)
    if family is not None:
        config = family.fitted(config, theirs.keys())
    with torch.device("meta"):
        model = config.build()
    assert isinstance(model, Model)
    ours = from_published(family, hf, theirs) if family else theirs
    check_weights(model, ours, directory)
    target, place, wide = None if dtype is None else as_dtype(dtype), as_device(device or "cpu"), float32_buffers(model)
    for name in list(ours):
        tensor = ours[name]
        kind = torch.float32 if name in wide else target if tensor.is_floating_point() else None
        ours[name] = tensor.to(place, kind).contiguous()
    model.load_state_dict(ours, assign=True)
    model.requires_grad_(True)
    model.origin = Origin(hf, directory)
    return model.eval()


def save(model: Model, directory: str | Path, *, shard_bytes: int = 5_000_000_000) -> None:
    """Write a directory that `load` gives back to the bit, and that transformers loads where it knows the architecture.

    A model that still has the config it was published with is written in that family's layout; any other with our own
    config in config.json. Tokenizer, chat template and generation config are copied from where the model came from.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; a model is saved to a directory")
    if any(isinstance(module, LoRA) for module in model.modules()):
        raise ValueError(
            "an adapter is chosen; write_adapter saves it, and choose(None) leaves the model's own weights"
        )
    weights = model.state_dict()
    hf = published_form(model)
    dtype = str(model.dtype).removeprefix("torch.")
    if hf is not None:
        family, keys = family_of(hf), Keys(hf)
        weights = unload(family.rules(keys), weights)
        write = {"model_type": family.name, **hf, "dtype" if "torch_dtype" not in hf else "torch_dtype": dtype}
    else:
        write = {"architectures": [NATIVE], "model_type": "landmark", "dtype": dtype, "config": to_dict(model.cfg)}
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory, weights, shard_bytes=shard_bytes)
    write_json(directory / "config.json", write)
    if model.origin is not None and model.origin.directory is not None:
        carry(model.origin.directory, directory)


def carry(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation and pooling config, leaving what the target has of its own."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            copy = target / path.relative_to(source)
            if path.is_file() and not copy.exists():
                with beside(copy) as temporary:
                    temporary.write_bytes(path.read_bytes())


def published_form(model: Model) -> dict[str, Any] | None:
    """The config.json of a family that describes this model exactly, or None."""
    if model.origin is None or (model.origin.hf.get("architectures") or [NATIVE])[0] == NATIVE:
        return None
    hf = dict(model.origin.hf)
    family = family_of(hf)
    described = family.read(hf)
    return hf if model.cfg in (described, family.fitted(described, ())) else None


def read_model_json(directory: Path) -> Any:
    """The contents of a model directory's config.json; ValueError that names an adapter's model for an adapter."""
    adapter = directory / "adapter_config.json"
    if adapter.exists() and not (directory / "config.json").exists():
        base = read_object(adapter).get("base_model_name_or_path")
        raise ValueError(f"{directory} is an adapter; give the model that it is for ({base}), and it with --adapter")
    return read_json(directory / "config.json")


def build(hf: Mapping[str, Any]) -> Model:
    """A model with fresh weights from the contents of a config.json."""
    hf = named(hf)
    config, _ = read_config(hf)
    model = config.build()
    assert isinstance(model, Model)
    model.origin = Origin(hf)
    return model


def read_config(hf: Mapping[str, Any]) -> tuple[ModelConfig, Family | None]:
    """Our config from a config.json, and its family; None for our own layout."""
    hf = named(hf)
    if hf["architectures"][0] == NATIVE:
        return own_config(hf["config"]), None
    family = family_of(hf)
    return family.read(hf), family


def own_config(tree: Mapping[str, Any]) -> ModelConfig:
    """The model that a tree of our own configs describes; a `Pattern` becomes the decoder that it stands for."""
    for module in pkgutil.iter_modules(nn.__path__):  # so that every part is known by its name
        importlib.import_module(f"{nn.__name__}.{module.name}")
    config = from_dict(tree)
    if not isinstance(config, ModelConfig):
        raise ValueError(f"{tree.get('type', 'this')} does not describe a whole model")
    return config.config() if isinstance(config, Pattern) else config


def describe(spec: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The config of a directory, a config.json, a published size, a hub id, a pattern of layers or the TOML file of a
    run with a [model], and its config.json; reads no weights."""
    path = Path(spec).expanduser()
    if is_pattern(str(spec)) and not path.exists():
        return native({"type": "Pattern", "pattern": str(spec)})
    if path.suffix == ".toml" and path.is_file():
        return of_run(path)
    if path.is_file() or (path / "config.json").is_file():
        hf = named(read_json(path) if path.is_file() else read_model_json(path))
        return read_config(hf)[0], hf
    if "/" not in str(spec) and (str(spec) in sizes() or not path.is_dir()):
        family, hf = published(str(spec))
        return family.read(hf), hf
    hf = named(read_model_json(locate(spec, patterns=("config.json",))))
    return read_config(hf)[0], hf


def native(tree: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """A tree of our own configs, and the config.json of such a model."""
    config = own_config(tree)
    return config, {"architectures": [NATIVE], "model_type": "landmark", "config": to_dict(config)}


def of_run(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a run, as its TOML file says it, with the vocabulary that [tokenizer] says."""
    try:
        run = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    model = run.get("model")
    if isinstance(model, str):
        return describe(model)
    if not isinstance(model, Mapping):
        raise ValueError(f"{path} has no [model]")
    size = run.get("tokenizer", {}).get("vocab_size")
    sized = {"vocab_size": size, **model} if size else dict(model)
    if "type" not in model:
        return read_config(sized)[0], named(sized)
    return native(sized if model["type"] == "Pattern" else model)


def locate(where: str | Path, patterns: Iterable[str] = DOWNLOADED) -> Path:
    """A directory for a path or a hub id."""
    path = Path(where).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; give the directory that holds it")
    if str(where).count("/") != 1 or str(where).startswith((".", "/", "~")):
        raise ValueError(f"{where} is no directory, and no hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(where), allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where} is no directory here, and the hub does not give it: {reason}") from None


def from_published(family: Family, hf: Mapping[str, Any], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A family's tensors under our names; files that were saved without the head lack the prefix, and a body is read
    from files that have it past the heads of pre-training."""
    prefix, headed = family.prefix, family.headed
    if prefix and not any(name.startswith(prefix) for name in theirs):
        theirs = {prefix + name: tensor for name, tensor in theirs.items()}
    if headed and any(name.startswith(headed) for name in theirs):
        theirs = {name.removeprefix(headed): t for name, t in theirs.items() if not name.startswith(PRETRAINED)}
    return apply_rules(family.rules(Keys(hf)), theirs)


def check_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], where: str | Path) -> None:
    """Every tensor there, of the right shape, and none besides."""
    for name, module in model.named_modules():
        if isinstance(module, Codes) and (side := weights.get(f"{name}.side")) is not None:
            try:
                module.fit(side)
            except ValueError as error:
                raise ValueError(f"{where}: {name + '.side'!r} {error}") from None
    wanted = model.state_dict()
    if missing := [name for name in wanted if name not in weights]:
        raise ValueError(f"{where} lacks {len(missing)} tensors, the first of them (by our name) {missing[0]!r}")
    if surplus := [name for name in weights if name not in wanted]:
        close = nearest(surplus[0], wanted)
        raise ValueError(f"{where} has {len(surplus)} tensors too many, the first (by our name) {surplus[0]!r}{close}")
    for name, tensor in wanted.items():
        if weights[name].shape != tensor.shape:
            have, want = tuple(weights[name].shape), tuple(tensor.shape)
            raise ValueError(f"{where}: {name!r} has the shape {have}, but config.json says {want}")
        if weights[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{where}: {name!r} holds {weights[name].dtype}, where the model has {tensor.dtype}")


def as_device(device: torch.device | str) -> torch.device:
    """Raises ValueError for a device that this machine does not have."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].removesuffix(".")
        raise ValueError(f"there is no device {str(device)!r} here: {reason}; choose cpu, or cuda on a GPU") from None


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """torch.bfloat16, "bfloat16" or "bf16"."""
    if isinstance(dtype, torch.dtype):
        return dtype
    known = {
        "float64": torch.float64, "fp64": torch.float64, "float32": torch.float32, "fp32": torch.float32,
        "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16,
    }  # fmt: skip
    if dtype not in known:
        raise ValueError(f"unknown dtype {dtype!r}{nearest(dtype, known)}; choose one of {', '.join(known)}")
    return known[dtype]

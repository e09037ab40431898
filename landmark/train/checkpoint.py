"""Checkpoints: directories that are complete or not there, with all that an exact continuation needs.

    checkpoints/step-00000500/  config.json, model.safetensors, tokenizer ...: a model directory like any other
                                optimizer.safetensors, state.json
    checkpoints/LATEST          the name of the one to go on from

A directory is written beside under a temporary name and renamed; LATEST follows; old ones go last. A kill at any moment
leaves a LATEST whose directory is whole.
"""

from __future__ import annotations

import base64
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import from_dict, to_dict
from ..models.base import Model, Origin
from ..parallel.data import is_sharded, whole
from ..parallel.world import World
from ..weights.checkpoint import NATIVE, carry
from ..weights.checkpoint import load as load_model
from ..weights.checkpoint import save as save_model
from ..weights.files import beside, read_json, write_json
from .optim import Updater

OPTIMIZER, STATE, SHARDS = "optimizer.safetensors", "state.json", "shards"


class Store:
    """The checkpoints of one run."""

    def __init__(self, root: Path, *, keep: int, world: World) -> None:
        self.root, self.keep, self.world = root, keep, world

    def name(self, step: int) -> str:
        return f"step-{step:08}"

    def latest(self) -> Path | None:
        """The directory to go on from; None if the run has saved nothing yet."""
        pointer = self.root / "LATEST"
        if not pointer.exists():
            return None
        directory = self.root / pointer.read_text(encoding="utf-8").strip()
        if not directory.is_dir():
            raise ValueError(f"{pointer} names {directory.name}, which is gone; write another of {self.root} into it")
        return directory

    def save(self, step: int, write: Callable[[Path], None], spared: str | None = None) -> Path:
        """Let every process `write` its part, make the directory the latest, remove old ones but the one `spared`.

        Raises OSError if that fails; what was good before still is.
        """
        final = self.root / self.name(step)
        temporary = self.root / f".{final.name}.tmp"
        if self.world.first:
            self.root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        self.world.barrier()
        try:
            write(temporary)
            self.world.barrier()
            if self.world.first:
                _sync(temporary)
                if final.exists():  # of a process that was killed before it wrote LATEST
                    shutil.rmtree(final)
                os.replace(temporary, final)
                _sync(self.root)
                with beside(self.root / "LATEST") as pointer:
                    pointer.write_text(final.name + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            last = self.latest()
            good = f"the last good checkpoint is {last}" if last else "there is no earlier one"
            raise OSError(f"cannot write {final}: {error}; {good}") from None
        if self.world.first:
            self.prune(spared)
        self.world.barrier()
        return final

    def prune(self, spared: str | None) -> None:
        """Remove all but the last `keep`, and what a killed process left half-written."""
        for name in sorted(path.name for path in self.root.glob("step-*"))[: -self.keep]:
            if name != spared:
                shutil.rmtree(self.root / name)
        for path in self.root.glob(".*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write(directory: Path, model: Model, updater: Updater, state: Mapping[str, Any], world: World) -> None:
    """Weights, optimiser and `state`: by the first process, or each its own shards."""
    if is_sharded(model):
        tensors = {f"weights.{name}": tensor for name, tensor in model.state_dict().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in updater.state().items()}
        from ..parallel import sharded

        sharded.save(directory / SHARDS, tensors)
        if world.first and model.origin is not None and model.origin.directory is not None:
            carry(model.origin.directory, directory)
    elif world.first:
        save_model(model, directory)
        ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in updater.state().items()}
        with beside(directory / OPTIMIZER) as temporary:
            save_file(ready, temporary)
    if world.first:
        write_json(directory / STATE, state)


def read(directory: Path, model: Model, updater: Updater) -> None:
    """Weights and optimiser from `write`, whether they were sharded then or are now.

    Values are copied into the memory that model and optimiser hold already, so that a continued run computes on the
    same layout, to the same bits.
    """
    if (directory / SHARDS).is_dir():
        like = {f"weights.{name}": tensor for name, tensor in model.state_dict().items()}
        like |= {f"optimizer.{name}": tensor for name, tensor in updater.state().items()}
        from ..parallel import sharded

        tensors = sharded.load(directory / SHARDS, like)
        weights = {k.removeprefix("weights."): t for k, t in tensors.items() if k.startswith("weights.")}
        state = {k.removeprefix("optimizer."): t for k, t in tensors.items() if k.startswith("optimizer.")}
    else:
        weights = load_model(directory).state_dict()
        try:
            with safe_open(directory / OPTIMIZER, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{directory / OPTIMIZER} is missing, truncated or corrupt ({error})") from None
    updater.load(model, weights, state)


def read_state(directory: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_json(directory / STATE)
    return state


def describe(model: Model) -> dict[str, Any]:
    """What sharded weights need to become a model again."""
    return {"config": to_dict(model.cfg), "published": dict(model.origin.hf) if model.origin else None}


def export(directory: str | Path, out: str | Path) -> None:
    """A checkpoint, sharded or not, as a model directory."""
    directory = Path(directory)
    if not (directory / SHARDS).is_dir():
        return save_model(load_model(directory), out)
    description = read_state(directory)["model"]
    config, published = from_dict(description["config"]), description["published"]
    with torch.device("meta"):
        model = config.build()
    from ..parallel import sharded

    tensors = sharded.load(directory / SHARDS, {}, prefix="weights.")
    model.load_state_dict({name.removeprefix("weights."): t for name, t in tensors.items()}, assign=True)
    model.origin = Origin(published or {"architectures": [NATIVE]}, directory)
    save_model(model, out)


def export_model(model: Model, out: Path, world: World) -> None:
    """A model in training, sharded or not, as a model directory. All processes must call."""
    weights = whole(model)
    if world.first and is_sharded(model):
        with torch.device("meta"):
            copy = model.cfg.build()
        copy.load_state_dict(weights, assign=True)
        assert isinstance(copy, Model)
        copy.origin = model.origin
        save_model(copy, out)
    elif world.first:
        save_model(model, out)
    world.barrier()


def random_state(device: torch.device) -> dict[str, Any]:
    """Of torch, numpy and Python, as JSON-ready data."""
    version, keys, gauss = random.getstate()
    kind, words, position, has_gauss, cached = np.random.get_state()
    assert isinstance(words, np.ndarray)
    state: dict[str, Any] = {
        "torch": _encode(torch.get_rng_state()),
        "numpy": [kind, words.tolist(), position, has_gauss, cached],
        "python": [version, list(keys), gauss],
    }
    if device.type == "cuda":
        state["cuda"] = _encode(torch.cuda.get_rng_state(device))
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Come back to `random_state`."""
    torch.set_rng_state(_decode(state["torch"]))
    np.random.set_state(tuple(state["numpy"]))
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_decode(state["cuda"]), device)


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

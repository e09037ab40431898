"""Files of a model directory: written beside and renamed, read by mapping them into memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, renamed to `path` when the block succeeds and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path, temporary):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new(path: Path) -> None:
    """Raises ValueError for a directory that holds something already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already; give a directory that is not there yet")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory of a temporary name beside `path`, renamed when the block succeeds and removed when it does not."""
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Within, `path` is written: an OSError that names no file (a full disk does not), or `temporary`, names it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, data: Any) -> None:
    with beside(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_text(path: Path) -> str:
    """Raises ValueError, naming the file, for what is not UTF-8, and OSError for what cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 (byte {error.start} is {error.object[error.start]:#x})") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file with one in each line, with the numbers of the lines; blank ones are left out.

    Only a line feed ends a line: JSON may hold the other characters that Python's `splitlines` takes for ends. Raises
    ValueError, naming the line, for what is not JSON, and for half a character of UTF-16, which JSON can spell.
    """
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(error.object[error.start]):04X}"
            raise ValueError(f"{path}, line {number} holds half a character, {half}; write whole ones") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}; write one JSON object a line") from None
        yield number, value


def read_json(path: Path) -> Any:
    """Raises ValueError, naming the file, if it is absent or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a model directory needs it") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """As `read_json`, of an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; it must be a JSON object")
    return value


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory's safetensors files, mapped from disk: memory is taken as pages are touched.

    Raises ValueError for files that are missing, truncated or corrupt, and for an index that does not fit its files.
    """
    index = directory / INDEX
    if index.exists():
        where: dict[str, str] = read_object(index).get("weight_map", {})
        if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
            raise ValueError(f"{index} has no weight_map from names of tensors to names of files; fetch it again")
        names = sorted(set(where.values()))
        if bad := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index} names a file outside of its folder: {bad[0]!r}")
    elif (directory / SINGLE).exists():
        where, names = {}, [SINGLE]
    else:
        names = sorted(p.name for p in directory.glob("*.safetensors"))
        where = {}
        if len(names) != 1:
            pickles = [p.name for p in (*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth"))]
            note = f" ({pickles[0]} is a pickle, which is never opened: convert it)" if pickles else ""
            raise ValueError(f"{directory} holds no {SINGLE} and no {INDEX}{note}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = directory / name
        if not path.exists():
            raise ValueError(f"{path} is missing, but {INDEX} names it; fetch it again")
        tensors |= read_file(path)
    if missing := sorted(where.keys() - tensors.keys()):
        raise ValueError(f"{directory}: {INDEX} promises the tensor {missing[0]!r}, which no file holds")
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, mapped from disk."""
    open(path, "rb").close()  # the library says of what may not be read that it is not there
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); fetch it again") from None


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], *, shard_bytes: int) -> None:
    """One file, or several of about `shard_bytes` with an index. Old weight files go when the new ones stand."""
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if used and used + tensor.nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    total = len(shards)
    names = [SINGLE] if total == 1 else [f"model-{n:05}-of-{total:05}.safetensors" for n in range(1, total + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard)
    if total > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        size = sum(tensor.nbytes for tensor in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    else:
        (directory / INDEX).unlink(missing_ok=True)
    for path in directory.glob("model*.safetensors"):
        if path.name not in names:
            path.unlink()


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file."""
    ready = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    try:
        with beside(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(_unshared(ready), temporary, metadata={"format": "pt"})
            temporary.chmod(mode)  # safetensors lets nobody else read it
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OSError(f"cannot write {path}: {reason}; what stood there before is untouched") from None


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are slices of one storage, each in its own, as the format wants it."""
    return {k: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for k, t in tensors.items()}
